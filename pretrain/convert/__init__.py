"""Between runs and Hugging Face folders: import, export, verify, push."""
