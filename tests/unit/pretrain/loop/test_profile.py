"""Which steps `--profile.first-step` traces."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest

from pretrain.config.presets import PRESETS
from pretrain.config.profile import ProfileConfig
from pretrain.loop.profile import StepProfile


@pytest.mark.parametrize(
    ("steps", "traced"),
    [
        ((1, 2, 3, 4, 5), ["step 2", "step 3", "step 4"]),
        ((1, 2, 3, 5, 6), ["step 2", "step 3"]),  # the last one is passed over
        ((1, 3, 4, 5), ["step 3", "step 4"]),
        ((1, 5, 6), []),
    ],
)
def test_steps_that_are_traced(
    steps: tuple[int, ...], traced: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pretrain.loop.profile.dist.get_rank", lambda: 1)
    config = replace(
        PRESETS["debug"](), output_dir=tmp_path, profile=ProfileConfig(first_step=2, steps=3)
    )
    profile = StepProfile(config)
    for step in steps:
        with profile.of(step):
            pass
    found = []
    for path in (tmp_path / "profile").glob("*"):  # written without `close`
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        found += [e["name"] for e in events if e["name"].startswith("step ") and "dur" in e]
    assert sorted(found) == traced
