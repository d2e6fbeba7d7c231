"""benchmarks/commands/does_it_pay.py: the guide says what the planner says."""

from pathlib import Path

import pytest

from commands import does_it_pay
from pretrain.config.presets import PRESETS

GUIDE = (Path(__file__).parents[3] / "docs" / "guides" / "does-it-pay.md").read_text()


@pytest.mark.parametrize(
    "name",
    ["8B on one node with NVLink", "70B on 1,024 GPUs", does_it_pay.TWO_NODES, "1B on one node"],
)
def test_the_guide_has_the_answers(name: str) -> None:
    for paragraph in does_it_pay.answer(name):
        assert does_it_pay._quoted(paragraph) in GUIDE


def test_the_guide_has_the_answer_for_decode() -> None:
    (paragraph,) = does_it_pay.decode()
    assert does_it_pay._quoted(paragraph) in GUIDE


def test_regions() -> None:
    """70B at TP 8: without a link one norm less decides at most; a link as slow as compute wants hiding;
    halves need two sequences, and tokens enough to be cheap."""
    model = PRESETS["llama-3-70b"]().model
    assert does_it_pay.region(model, 0.0, 16384) == "standard"
    assert does_it_pay.region(model, 0.3, 2048) == "parallel-ladder"
    assert does_it_pay.region(model, 0.3, 8192) == "ladder"
    assert does_it_pay.region(model, 0.3, 65536) == "standard, halves"
    assert does_it_pay.region(model, 1.5, 65536) == "parallel, halves"


def test_the_picture_is_drawn() -> None:
    assert does_it_pay.draw(across=2, up=6).startswith(b"\x89PNG")
