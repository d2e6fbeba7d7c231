"""Trains models, and converts, evaluates, reports and serves what was trained."""

import megatron_ladder  # noqa: F401 (first: it says which cuDNN Transformer Engine is to load)
