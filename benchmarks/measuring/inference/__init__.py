"""What benchmarks/inference.py measures, models and draws."""
