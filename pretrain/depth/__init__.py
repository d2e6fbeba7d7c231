"""`report depth`: what each layer of a model does, and what changes without it; a page and pictures."""
