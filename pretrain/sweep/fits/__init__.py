"""Fits to the losses of a sweep: scaling laws, and the best learning rate."""
