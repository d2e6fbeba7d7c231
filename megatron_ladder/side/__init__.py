"""Ladder side-tuning (arXiv 2206.06522): a small network that is trained beside a model that is not."""
