"""The subcommands, a file for each group. Each takes options and returns an exit status.

Importing these files does not import torch: `--help` works without it.
"""
