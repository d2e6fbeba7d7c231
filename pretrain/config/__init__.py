"""A run's configuration: dataclasses that are checked and saved, and presets."""
