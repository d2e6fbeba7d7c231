"""The files of a model's folder: written complete or not at all, tensors read and written one at a time."""
