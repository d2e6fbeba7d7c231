"""What benchmarks/overlap.py compares, and the shares of a link's time that are hidden."""
