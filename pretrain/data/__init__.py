"""From data set folders to batches: checks, blends, sequences."""
