"""Every parameter's gradient beside an oracle's."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

ATOL, RTOL = 2e-6, 1e-4
"""Of an element. fp32 sums in another order."""
SHARE = 3e-4
"""Of a parameter's whole gradient, in norm. In some parameters all elements are smaller than ATOL. At most
4.6e-5 was seen."""


def assert_same_gradients(
    found: Iterable[tuple[str, Tensor]],
    expected: Mapping[str, Tensor],
    where: object,
    atol: float = ATOL,
) -> None:
    """Compares each gradient of the oracle, by element and as a whole.

    Args:
        found: by name; may have more, such as a tied embedding's second name.
        where: to say which it was.
    """
    by_name = dict(found)
    assert expected.keys() <= by_name.keys(), where
    for name, gradient in expected.items():
        torch.testing.assert_close(
            by_name[name],
            gradient,
            atol=atol,
            rtol=RTOL,
            msg=lambda m, name=name: f"{where}, {name}: {m}",
        )
        wrong, norm = (by_name[name] - gradient).norm(), gradient.norm()
        assert wrong <= SHARE * norm, f"{where}, {name}: {wrong:.2e} of {norm:.2e}"
