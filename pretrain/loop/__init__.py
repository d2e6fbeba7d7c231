"""The training loop: steps, bad steps, saving, stopping, the log."""
