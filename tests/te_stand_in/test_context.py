"""Context parallelism in Transformer Engine's layers: which attention runs, what it gets, all gradients.

Transformer Engine's ring itself needs several GPUs: ring.py stands in for it.
"""

from pathlib import Path
from typing import Any

import pytest

from megatron_ladder.config import ParallelConfig
from tests.ranks import run_ranks
from tests.te_run import LAYERS, Run, model_of
from tests.te_stand_in import MARKS

pytestmark = MARKS
LAYOUTS = {
    "cp2": ParallelConfig(context_parallel_size=2),
    "tp2-sp-cp2": ParallelConfig(
        tensor_model_parallel_size=2, sequence_parallel=True, context_parallel_size=2
    ),
}
REFUSAL = "CUDNN_STATUS_SUBLIBRARY_LOADING_FAILED"
# What is asked for, cuDNN's answer, documents apart: what is said, and whether TE's ring then runs.
CASES: dict[tuple[str, str, bool], tuple[str, str, bool]] = {
    ("auto", "", False): ("te", "cuDNN", True),
    ("te", "", False): ("te", "cuDNN", True),
    ("auto", REFUSAL, False): ("torch", "flash attention", False),
    ("torch", "", False): ("torch", "flash attention", False),
    ("unfused", "", False): ("unfused", "scores in memory", False),
    ("auto", "", True): ("torch", "flash attention", False),
    ("unfused", "", True): ("unfused", "scores in memory", False),
}


def run_each(kind: str, layout: str) -> list[str]:
    """What is wrong, in words, with each attention that can be had."""
    from tests.te_stand_in import kernels, ring

    kernels.install()
    from transformer_engine.pytorch.attention.dot_product_attention.dot_product_attention import (
        _attention_backends as taken,
    )

    from megatron_ladder.errors import UserError
    from megatron_ladder.mcore_compat import initialize_model_parallel, transformer_config
    from megatron_ladder.te.attention import parameters

    parallel = LAYOUTS[layout]
    initialize_model_parallel(parallel, seed=0)
    model, found = model_of(kind), []
    local = {m: Run(model, parallel, impl="local", apart=m) for m in (False, True)}
    for (attention, refusal, apart), (whose, kernel, goes_around) in CASES.items():
        kernels.cudnn_says = refusal
        kernels.attentions.clear()
        ring.calls.clear()
        taken["attention_params"] = None  # or it would not ask cuDNN again
        how: dict[str, Any] = {"weights": local[apart].weights, "attention": attention}
        run = Run(model, parallel, precision="bf16", apart=apart, **how)
        core, case = run.config.core_attention, (attention, refusal, apart)
        if (core.whose, core.kernel) != (whose, kernel):
            found.append(f"{case}: {core}")
        way = "p2p" if model.sliding_window is None else "all_gather"
        if ring.calls != [way] * LAYERS * goes_around or len(kernels.attentions) != len(ring.calls):
            found.append(f"{case}: TE ran {kernels.attentions}, around the ring {ring.calls}")
        if not run.worst(local[apart]) < 0.05:
            found.append(f"{case}: gradients differ by {run.worst(local[apart])}")
        if attention == "auto" and (refusal or apart) and "Transformer Engine" not in core.why:
            found.append(f"{case}: no reason in {core.why!r}")
        if goes_around:  # TE asked itself the same
            asked = parameters(run.config, micro_batch_size=run.batch, seq_length=64, apart=False)
            if asked != taken["attention_params"]:
                found.append(f"{case}: {asked} is not {taken['attention_params']}")
    kernels.cudnn_says = REFUSAL
    for apart, reason in ((False, REFUSAL), (True, "documents of a multiple of 2 x")):
        with pytest.raises(UserError, match=reason):
            transformer_config(
                *(model, parallel),
                precision="bf16",
                attention="te",
                documents_apart=apart,
            )
    return found


@pytest.mark.parametrize(
    ("kind", "layout"), [("ladder", "cp2"), ("windows", "cp2"), ("standard", "tp2-sp-cp2")]
)
def test_each_attention_over_context_parallel_ranks(kind: str, layout: str, tmp_path: Path) -> None:
    ranks = LAYOUTS[layout].model_parallel_size
    for found in run_ranks(ranks, run_each, kind, layout, tmp_path=tmp_path):
        assert not found, "\n".join(found)
