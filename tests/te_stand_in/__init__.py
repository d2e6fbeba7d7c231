"""Transformer Engine's own layers, in Python, on kernels that are plain PyTorch here: kernels.py.

They need the package with its extension, and no GPU; where there is a GPU, tests/gpu is to be run.
"""
