"""What the benchmarks share: options, what is written beside figures, measuring side by side."""

import megatron_ladder  # noqa: F401 (first: it says which cuDNN Transformer Engine is to load)
