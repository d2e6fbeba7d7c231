"""What the benchmarks share: options, what is written beside figures, measuring side by side."""
