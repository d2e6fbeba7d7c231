"""benchmarks/sequences/long_prompts.py: what it reads in chunks and whole is the same, beside requests that
decode."""

from pathlib import Path
from typing import Any

from megatron.core import parallel_state

from megatron_ladder.config import ParallelConfig
from megatron_ladder.mcore_compat import (
    build_gpt_model,
    initialize_model_parallel,
    transformer_config,
)
from sequences.long_prompts import DECODED, model_of, read
from tests.ranks import run_ranks

PROMPT = 290


def both() -> list[dict[str, Any]]:
    parallel_state.destroy_model_parallel()  # a test of the process that this one is forked from
    initialize_model_parallel(ParallelConfig(), seed=0)
    model = model_of(32, 2, PROMPT)
    (gpt,) = build_gpt_model(model, transformer_config(model, ParallelConfig()))
    return [read(gpt.eval(), model, PROMPT, way) for way in ("50", "whole")]


def test_a_prompt_is_read_in_steps_of_the_size_that_is_asked_for(tmp_path: Path) -> None:
    ((chunks, whole),) = run_ranks(1, both, tmp_path=tmp_path)
    assert len(chunks["steps"]) == 5  # up to 64 tokens, four of them of others
    assert len(whole["steps"]) == 1
    assert chunks["first"] == whole["first"] and len(whole["first"]) == 1
    for run in (chunks, whole):
        assert len(run["alone"]) == DECODED
        assert run["bytes"] >= 0 and min(run["steps"]) > 0
