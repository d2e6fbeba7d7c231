"""Tests: unit/ mirrors the packages."""

import megatron_ladder  # noqa: F401 (first: it says which cuDNN Transformer Engine is to load)
