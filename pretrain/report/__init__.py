"""Runs side by side: a page and its pictures."""
