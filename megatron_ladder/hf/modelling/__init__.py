"""The modelling files that are copied into exported folders: configuration, layers, RoPE, side network.

The tests compare training with them. They import torch and transformers alone.
"""
