"""benchmarks/measuring/hidden.py: how much of a link's time can be hidden."""

import pytest

from measuring import hidden
from pretrain.plan.planner import Submodule


@pytest.mark.parametrize("layers", [1, 4, 24])
def test_how_much_can_be_hidden(layers: int) -> None:
    """Counted along docs/design/overlap.md: of n sub-modules, only a pass's ends stand alone."""
    n = 2 * layers
    plain = hidden.most_hidden(layers, False)
    # Forward's last all-reduce; backward's last runs behind a weight gradient.
    assert plain == pytest.approx(
        {"forward": (n - 1) / n, "backward": 1, "total": (2 * n - 1) / (2 * n)}
    )
    # In halves: forward's first all-gather and last reduce-scatter, of 2 n; backward's first
    # all-gather, of 3 n.
    sp = hidden.most_hidden(layers, True)
    assert sp == pytest.approx(
        {"forward": 1 - 2 / (2 * n), "backward": 1 - 1 / (3 * n), "total": 1 - 3 / (5 * n)}
    )
    # A link that takes twice as long as what it could hide behind.
    short = Submodule(1.0, 2.0, 0.5)
    slow = hidden.most_hidden(layers, False, (short, short), 2.0)
    assert slow["forward"] == pytest.approx((n - 1) / n / 2)
