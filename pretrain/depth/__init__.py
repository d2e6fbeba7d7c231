"""What each layer of a model does, and what the model does without it: a page and pictures."""
