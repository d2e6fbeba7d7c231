"""Losses of logits whose vocabulary is cut over the tensor-parallel ranks: distillation, z-loss."""
