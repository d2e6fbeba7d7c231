"""Tokenizers, and how the documents of one part become token ids in files."""
