"""The model, and how it runs: compiled layers, CUDA graphs, queues, cuDNN."""
