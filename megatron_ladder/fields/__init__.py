"""What fields of config.py mean, and whether they go together."""
