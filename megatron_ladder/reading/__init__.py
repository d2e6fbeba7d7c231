"""Reads a checkpoint's files as data alone: nothing in them runs, or takes memory without bound."""
