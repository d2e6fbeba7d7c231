"""A run's folder: checkpoints, metrics, status, and what else is recorded there."""
