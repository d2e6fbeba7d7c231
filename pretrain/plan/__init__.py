"""Step time and memory of a layout, modelled before anything runs."""
