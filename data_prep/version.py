"""The project's version. pyproject.toml reads it here, so a checkout that is not installed has it too."""

VERSION = "0.1.0"
