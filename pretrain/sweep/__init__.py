"""Sweeps: many runs from one file, their best rates, and scaling laws fitted to their losses."""
