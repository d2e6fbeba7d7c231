"""The optimizer with its learning rate, its part of a checkpoint, and an average of the weights."""
