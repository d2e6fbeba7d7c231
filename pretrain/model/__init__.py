"""The model, its optimizer and what they run on: compiled layers, CUDA graphs, queues, cuDNN."""
