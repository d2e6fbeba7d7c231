"""Translations refined in stages: triplets, and the script that trains on them."""
