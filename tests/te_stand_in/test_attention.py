"""Which attention TE's layers get: what TE says it would take is what runs, and the gradients of all."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run_ranks
from tests.te_run import LAYERS, LAYOUTS, Run, model_of
from tests.te_stand_in import MARKS

pytestmark = MARKS
REFUSAL = "CUDNN_STATUS_SUBLIBRARY_LOADING_FAILED"


def begin(layout: str) -> tuple[Any, Any]:
    from tests.te_stand_in import kernels

    kernels.install()
    from megatron_ladder.mcore_compat import initialize_model_parallel

    initialize_model_parallel(LAYOUTS[layout], seed=0)
    return kernels, LAYOUTS[layout]


def run_each(kind: str, layout: str) -> list[str]:
    """What is wrong, in words, with each attention that can be had."""
    kernels, parallel = begin(layout)
    from transformer_engine.pytorch.attention.dot_product_attention.dot_product_attention import (
        _attention_backends as taken,
    )

    from megatron_ladder.te.attention import parameters

    model, found = model_of(kind), []
    # Asked for, cuDNN's answer, documents apart: what is said, and what TE then runs.
    cases = {
        ("auto", "", False): (("te", "cuDNN"), "fused"),
        ("te", "", False): (("te", "cuDNN"), "fused"),
        ("auto", REFUSAL, False): (("torch", "flash attention"), None),
        ("te", REFUSAL, False): (("te", "scores in memory"), "unfused"),
        ("torch", "", False): (("torch", "flash attention"), None),
        ("unfused", "", False): (("unfused", "scores in memory"), None),
        ("auto", "", True): (("te", "cuDNN"), "fused"),
        ("te", "", True): (("te", "cuDNN"), "fused"),
        ("auto", REFUSAL, True): (("torch", "flash attention"), None),
        ("te", REFUSAL, True): (("te", "scores in memory"), "unfused"),
        ("unfused", "", True): (("unfused", "scores in memory"), None),
    }
    local = {m: Run(model, parallel, impl="local", apart=m) for m in (False, True)}
    for (attention, refusal, apart), (said, runs) in cases.items():
        kernels.cudnn_says = refusal
        kernels.attentions.clear()
        taken["attention_params"] = None  # or it would not ask cuDNN again
        run = Run(
            *(model, parallel),
            precision="bf16",
            weights=local[apart].weights,
            attention=attention,
            apart=apart,
        )
        core, case = run.config.core_attention, (attention, refusal, apart)
        if (core.whose, core.kernel) != said or core.keeps_scores != ("scores" in said[1]):
            found.append(f"{case}: {core}")
        if kernels.attentions != ([runs] * LAYERS if runs else []):
            found.append(f"{case}: TE ran {kernels.attentions}")
        if not run.worst(local[apart]) < 0.05:
            found.append(f"{case}: gradients differ by {run.worst(local[apart])}")
        if attention in ("auto", "te") and refusal not in core.why:
            found.append(f"{case}: {core.why}")
        if runs:  # TE asked itself the same
            asked = parameters(run.config, micro_batch_size=run.batch, seq_length=64, apart=apart)
            if apart:  # which documents a batch has, the question cannot know
                asked = replace(asked, batch_size=2 * run.batch - 1)
            if asked != taken["attention_params"]:
                found.append(f"{case}: {asked} is not {taken['attention_params']}")
    return found


@pytest.mark.parametrize(
    ("kind", "layout"), [("ladder", "1"), ("standard", "tp2"), ("last-n", "tp2-sp")]
)
def test_what_is_asked_is_what_runs(kind: str, layout: str, tmp_path: Path) -> None:
    ranks = LAYOUTS[layout].tensor_model_parallel_size
    for found in run_ranks(ranks, run_each, kind, layout, tmp_path=tmp_path):
        assert not found, "\n".join(found)


def run_windows(kind: str, layout: str) -> list[str]:
    """What is wrong, in words: layers with and without a window, by each attention."""
    kernels, parallel = begin(layout)
    from transformer_engine.pytorch.attention.dot_product_attention.dot_product_attention import (
        _attention_backends as taken,
    )

    from megatron_ladder.te.attention import parameters

    model, found = model_of(kind), []
    cases = {
        ("auto", "", False): (("te", "cuDNN"), "fused"),
        ("te", REFUSAL, False): (("te", "scores in memory"), "unfused"),
        ("auto", REFUSAL, False): (("torch", "flash attention"), None),
        ("unfused", "", False): (("unfused", "scores in memory"), None),
        ("auto", "", True): (("te", "cuDNN"), "fused"),
        ("te", REFUSAL, True): (("te", "scores in memory"), "unfused"),
        ("auto", REFUSAL, True): (("torch", "flash attention"), None),
        ("unfused", "", True): (("unfused", "scores in memory"), None),
    }
    local = {m: Run(model, parallel, impl="local", apart=m) for m in (False, True)}
    for (attention, refusal, apart), (said, runs) in cases.items():
        kernels.cudnn_says = refusal
        kernels.attentions.clear()
        taken["attention_params"] = None
        how = {"attention": attention, "apart": apart, "weights": local[apart].weights}
        run = Run(model, parallel, precision="bf16", **how)
        core, case = run.config.core_attention, (attention, refusal, apart)
        if (core.whose, core.kernel) != said:
            found.append(f"{case}: {core}")
        if kernels.attentions != ([runs] * LAYERS if runs else []):
            found.append(f"{case}: TE ran {kernels.attentions}")
        if not run.worst(local[apart]) < 0.05:
            found.append(f"{case}: gradients differ by {run.worst(local[apart])}")
        if runs:  # the last layer has a window
            asked = parameters(run.config, micro_batch_size=run.batch, seq_length=64, apart=apart)
            if apart:
                asked = replace(asked, batch_size=2 * run.batch - 1)
            if asked != taken["attention_params"]:
                found.append(f"{case}: {asked} is not {taken['attention_params']}")
    full = replace(model, sliding_window=None, sliding_window_layers=None)
    for apart in (False, True):
        how = {"apart": apart, "weights": local[apart].weights}
        if not Run(full, parallel, impl="local", **how).worst(local[apart]) > 0.1:
            found.append(f"the window changes nothing, documents apart {apart}")
    return found


@pytest.mark.parametrize(("kind", "layout"), [("windows", "1"), ("ladder windows", "tp2-sp")])
def test_windows_by_each_attention(kind: str, layout: str, tmp_path: Path) -> None:
    ranks = LAYOUTS[layout].tensor_model_parallel_size
    for found in run_ranks(ranks, run_windows, kind, layout, tmp_path=tmp_path):
        assert not found, "\n".join(found)


def ask_in_odd_ways() -> dict[str, Any]:
    _, parallel = begin("1")
    import transformer_engine_torch as tex

    from megatron_ladder.mcore_compat import transformer_config

    def taken(**options: Any) -> Any:
        given = {"impl": "transformer_engine", "precision": "bf16"} | options
        return transformer_config(model_of("ladder"), parallel, **given).core_attention

    log = logging.getLogger("DotProductAttention")
    taken()  # TE sets up its log when it is asked first
    before = (log.level, list(log.handlers), log.propagate)
    found = {"fp32": taken(precision="fp32")}
    tex.get_fused_attn_backend = lambda _: 1 / 0
    found["error"] = taken()
    found["te in spite of an error"] = taken(attention="te")
    found["log"] = before == (log.level, list(log.handlers), log.propagate)
    return found


def test_an_error_on_the_way_and_fp32_are_reasons(tmp_path: Path) -> None:
    (found,) = run_ranks(1, ask_in_odd_ways, tmp_path=tmp_path)
    assert found["fp32"].whose == "torch"
    assert "Disabling FusedAttention for unsupported qkv_dtype" in found["fp32"].why
    assert "flash-attn is not installed" in found["fp32"].why
    assert found["error"].whose == "torch"
    assert "it could not be asked: ZeroDivisionError" in found["error"].why
    assert found["te in spite of an error"].keeps_scores
    assert found["log"]
