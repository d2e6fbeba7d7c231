"""A run's configuration as dataclasses, checked and saved, and the presets."""
