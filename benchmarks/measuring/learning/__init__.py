"""What benchmarks/learning.py makes of its runs."""
