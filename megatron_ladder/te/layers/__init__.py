"""Linears and norms in Transformer Engine, with FP8."""
