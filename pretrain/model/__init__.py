"""The model and its optimizer, and how they run: compiled layers, CUDA graphs, queues, cuDNN."""
