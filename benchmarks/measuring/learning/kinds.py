"""The kinds whose learning is compared, and the options of `train` for each."""

from typing import Any

from pretrain.plan.search import KINDS as RESIDUALS

HYBRID = "hybrid"
"""Of the layers the last half is ladder; the others are standard."""
KINDS = (*map(str, RESIDUALS), HYBRID)


def model_fields(kind: str, num_layers: int) -> dict[str, Any]:
    """Those of ModelConfig."""
    if kind == HYBRID:
        return {"residual": "ladder", "ladder_layers": num_layers // 2}
    return {"residual": kind}
