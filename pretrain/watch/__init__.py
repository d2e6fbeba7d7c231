"""Beside a training: its checkpoints are measured and exported, in a process of the lowest priority."""
