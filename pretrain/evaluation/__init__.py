"""Perplexity, tasks made of local text, lm-evaluation-harness."""
