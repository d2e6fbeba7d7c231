"""Turns data set folders into batches: checks, blends, sequences."""
