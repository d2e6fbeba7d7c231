"""Code that uses Transformer Engine, for GPUs. Imported only where Transformer Engine is installed."""
