"""Changes the order in which autograd runs backward, so that collectives overlap with computation.

Of the nodes that are ready, autograd runs the one with the highest sequence number, which is the newest.
The node that waits for a sub-module's input gradient is newer than every node of the previous
sub-module. So autograd would run it at once, and the reduction would overlap with nothing. We lower the
node's number to the number at which the previous sub-module begins. Then autograd runs the whole backward
of the previous sub-module first.

`_set_sequence_nr` is private to torch. tests/distributed/test_asynchrony.py fails when it stops working.
Without it the gradients are still correct, but backward does not overlap. A warning is logged once.
"""

import logging
from typing import Any

logger = logging.getLogger(__name__)

enabled = True
"""False keeps autograd's own order. benchmarks/overlap.py measures what that costs."""
_warned = False


def natural_number(node: Any) -> int | None:
    """The sequence number of a backward node in autograd; None when this torch does not expose it."""
    number = getattr(node, "_sequence_nr", None)
    return None if number is None else number()


def run_no_sooner_than(node: Any, number: int) -> None:
    """Makes autograd run every ready node that was made after `number` before this node."""
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
