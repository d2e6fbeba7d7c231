"""Conversion between runs and Hugging Face folders: import, export, verification, upload."""
