"""The project's version. pyproject.toml reads it here, as a checkout that is not installed has no other."""

VERSION = "0.1.0"
