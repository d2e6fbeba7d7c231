"""Core attention: torch's kernels, windows, documents, context parallelism; which of the kernels runs."""
