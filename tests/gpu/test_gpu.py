"""The same model on a GPU, with megatron-core's local layers and with Transformer Engine's."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from megatron_ladder.config import ModelConfig, ParallelConfig
from megatron_ladder.hf.convert import megatron_to_hf
from megatron_ladder.hf.model_config import to_hf_config
from megatron_ladder.hf.modelling.modeling_ladder import LadderForCausalLM
from tests.data_sets import write_data_set

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
IMPLS = [
    "local",
    pytest.param(
        "transformer_engine",
        marks=pytest.mark.skipif(
            find_spec("transformer_engine") is None, reason="no Transformer Engine"
        ),
    ),
]
KINDS = {
    "standard": {"residual": "standard"},
    "parallel": {"residual": "parallel"},
    "ladder": {"residual": "ladder"},
    "last-n": {"residual": "ladder", "ladder_layers": 2},
    "parallel-ladder": {"residual": "parallel-ladder"},
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", KINDS)
def test_bf16_logits_are_near_the_fp32_oracle(kind: str, impl: str, tmp_path: Path) -> None:
    from megatron.core import dist_checkpointing, parallel_state

    from megatron_ladder.mcore_compat import (
        build_gpt_model,
        initialize_model_parallel,
        transformer_config,
    )
    from pretrain.run.checkpoint import load_weights

    model = ModelConfig(
        num_layers=4,
        hidden_size=128,
        ffn_hidden_size=256,
        num_attention_heads=4,
        num_query_groups=2,
        vocab_size=512,
        init_method_std=0.05,
        **KINDS[kind],
    )
    parallel = ParallelConfig()
    torch.distributed.init_process_group(
        "nccl", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        initialize_model_parallel(parallel, seed=0)
        config = transformer_config(model, parallel, precision="bf16", impl=impl)
        (gpt,) = build_gpt_model(model, config, impl)
        metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(True)}
        (tmp_path / "weights").mkdir()
        dist_checkpointing.save(
            gpt.sharded_state_dict(metadata=metadata), str(tmp_path / "weights")
        )
        tokens = torch.randint(0, 512, (2, 64), generator=torch.Generator().manual_seed(0))
        positions = torch.arange(64).expand(2, -1)
        with torch.no_grad():
            logits = gpt(tokens.cuda(), positions.cuda(), None).float().cpu()
        weights = load_weights(tmp_path / "weights")
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
    plain = LadderForCausalLM(to_hf_config(model)).float()
    hf = {n: t.float() for n, t in megatron_to_hf(weights, plain.config)}
    plain.load_state_dict(hf, strict=False)
    plain.tie_weights()
    with torch.no_grad():
        expected = plain(tokens).logits
    # bf16 has 8 bits: some 1 % of the logits' size after four layers.
    assert (logits - expected).norm() / expected.norm() < 0.02


@pytest.mark.parametrize("impl", IMPLS)
def test_the_debug_preset_trains_in_bf16(impl: str, tmp_path: Path) -> None:
    data = write_data_set(tmp_path / "data")
    arguments = ["--preset", "debug", "--data.paths", str(data), "--precision", "bf16"]
    arguments += ["--output-dir", str(tmp_path / "run"), "--transformer-impl", impl]
    done = subprocess.run(
        [sys.executable, "-m", "pretrain.cli", "train", *arguments, "--nproc-per-node", "1"],
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stdout + done.stderr
