"""Models the step time and the memory of a layout before anything runs."""
