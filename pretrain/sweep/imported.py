"""What a sweep's runs import, once for all of them (see in_turn.py)."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # megatron-core's, of optional packages; `doctor` lists these
    import pretrain.loop.train  # noqa: F401
