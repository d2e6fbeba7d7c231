"""What is written against Transformer Engine, for GPUs; imported only where that is installed."""
