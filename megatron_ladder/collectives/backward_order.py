"""The order in which autograd runs backward, mended for the overlap.

Of the nodes that are ready, autograd runs the one with the highest sequence number: the newest. The
wait for a sub-module's input gradient is newer than every node of the sub-module before it, so it
would run at once, and nothing would hide the reduction. Lowering its number to where the sub-module
before begins makes autograd run that one's whole backward first.

`_set_sequence_nr` is private to torch: tests/distributed/test_asynchrony.py fails loudly when it
stops working. Without it training is as correct, and backward is not overlapped: we warn once.
"""

import logging
from typing import Any

logger = logging.getLogger(__name__)

enabled = True
"""False leaves autograd's own order; benchmarks/overlap.py shows what that costs."""
_warned = False


def natural_number(node: Any) -> int | None:
    """A backward node's place in autograd's own order; None when torch does not say."""
    number = getattr(node, "_sequence_nr", None)
    return None if number is None else number()


def run_no_sooner_than(node: Any, number: int) -> None:
    """Lets every ready node made after `number` run before this one."""
    global _warned
    if not enabled:
        return
    try:
        node._set_sequence_nr(number)
    except AttributeError:
        if not _warned:
            logger.warning(
                "This torch cannot change the order of backward (no _set_sequence_nr): gradients "
                "stay exact, but backward's collectives are not hidden. Use torch 2.11 to 2.13."
            )
        _warned = True
