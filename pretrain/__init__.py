"""Training, and what is done with what was trained."""

import megatron_ladder  # noqa: F401 (first: it says which cuDNN Transformer Engine is to load)
