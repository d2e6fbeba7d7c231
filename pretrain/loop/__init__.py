"""The training loop: steps, bad steps, saving of checkpoints, stop signals, the log."""
