"""Documents out of input files: local or remote, compressed or not, of any format."""
