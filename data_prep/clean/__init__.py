"""Duplicates and quality rules; grades of drafts."""
