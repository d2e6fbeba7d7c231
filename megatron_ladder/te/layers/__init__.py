"""Linears and norms that use Transformer Engine's kernels, with FP8."""
