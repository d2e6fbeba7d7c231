"""Tensor-parallel collectives, each split into a start and a wait."""
