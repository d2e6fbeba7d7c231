"""megatron-core's model with our layers against the plain-PyTorch oracle, in fp32.

The oracle is the exported Hugging Face model itself; `tests/unit/hf` holds it to transformers' Llama
and to the paper's recurrence.
"""

import itertools
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing, parallel_state
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from megatron_ladder.config import ModelConfig, ParallelConfig
from megatron_ladder.hf.convert import megatron_to_hf
from megatron_ladder.hf.export import export_folder
from megatron_ladder.hf.model_config import to_hf_config
from megatron_ladder.hf.modelling.modeling_ladder import LadderForCausalLM
from megatron_ladder.hf.standard import standard_config
from megatron_ladder.mcore_compat import (
    build_gpt_model,
    initialize_model_parallel,
    transformer_config,
)
from pretrain.run.checkpoint import load_weights
from tests.ranks import run_ranks
from tests.unit.hf.tiny import train_sentencepiece

KINDS = {
    "standard": {"residual": "standard"},
    "parallel": {"residual": "parallel"},
    "ladder": {"residual": "ladder"},
    "last-n": {"residual": "ladder", "ladder_layers": 2},
    "list": {"residual": "ladder", "ladder_layers": (0, 2)},
    "parallel-ladder": {"residual": "parallel-ladder"},
    "ladder by skipinit": {"residual": "ladder", "residual_scaling": "skipinit"},
}
SOME_RANKS = {
    "standard": (2,),
    "parallel": (2,),
    "ladder": (1, 2),
    "last-n": (2,),
    "list": (1,),
    "parallel-ladder": (2,),
}
"""Of each kind, in each run; the slow run has one and two ranks of all."""


def kinds_and_ranks(some: dict[str, tuple[int, ...]]) -> list:
    """Both for each of KINDS; slow, but for those given."""
    return [
        pytest.param(kind, tp, marks=() if tp in some.get(kind, ()) else pytest.mark.slow)
        for kind, tp in itertools.product(KINDS, (1, 2))
    ]


# fp32 sums in another order. Exchanging two residual reads changes logits by more than 0.1 here.
LOGITS_TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 1e-5

BATCH, LENGTH, VOCAB = 2, 24, 500


def tokens() -> Tensor:
    return torch.randint(0, VOCAB, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(1))


def variants(kind: str) -> list[ModelConfig]:
    """MHA and GQA, tied and untied, with and without Llama 3's RoPE scaling."""
    return [
        ModelConfig(
            num_layers=4,
            hidden_size=32,
            ffn_hidden_size=64,
            num_attention_heads=4,
            num_query_groups=groups,
            vocab_size=VOCAB,
            init_method_std=0.1,
            share_embeddings_and_output_weights=tied,
            rotary_base=10000.0 if tied else 500_000.0,
            rope_scaling_factor=None if tied else 8.0,
            **KINDS[kind],
        )
        for groups, tied in itertools.product((4, 2), (True, False))
    ]


def run_model(model: ModelConfig, tp: int, folder: Path, recompute: str = "none") -> Tensor:
    """On each rank: logits of the real vocabulary; weights and gradients go to `folder`."""
    parallel = ParallelConfig(tensor_model_parallel_size=tp)
    parallel_state.destroy_model_parallel()
    initialize_model_parallel(parallel, seed=0)
    config = transformer_config(model, parallel, recompute=recompute)
    (gpt,) = build_gpt_model(model, config)
    with torch.no_grad():  # norms start as ones and scales at zero, which would hide a wrong one
        noise = torch.Generator().manual_seed(2)
        for name, parameter in gpt.named_parameters():
            if "norm" in name or "scales" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=noise))
    save_model(gpt, folder / "weights")

    batch = tokens()
    inputs, labels = batch[:, :-1], batch[:, 1:]
    positions = torch.arange(LENGTH).expand(BATCH, -1)
    with torch.no_grad():
        local = gpt(inputs, positions, None).contiguous()  # [b, s, vocabulary / tp]
        parts = [torch.empty_like(local) for _ in range(tp)]
        torch.distributed.all_gather(
            parts, local, group=parallel_state.get_tensor_model_parallel_group()
        )
    gpt(inputs, positions, None, labels=labels).mean().backward()
    with torch.no_grad():  # gradients are gathered as weights are: by a checkpoint
        for parameter in gpt.parameters():
            parameter.copy_(parameter.grad)
    save_model(gpt, folder / "gradients")
    return torch.cat(parts, dim=-1)[..., :VOCAB]


def save_model(gpt: torch.nn.Module, folder: Path) -> None:
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(True)}
    if torch.distributed.get_rank() == 0:
        folder.mkdir(parents=True)
    torch.distributed.barrier()
    dist_checkpointing.save(gpt.sharded_state_dict(metadata=metadata), str(folder))


def run_variants(kind: str, tp: int, folder: Path) -> list[Tensor]:
    return [run_model(m, tp, folder / str(i)) for i, m in enumerate(variants(kind))]


def oracle(model: ModelConfig, folder: Path) -> LadderForCausalLM:
    """The plain model with the weights that the ranks saved; its vocabulary keeps the padding, as
    the padding takes part in the loss's softmax."""
    config = to_hf_config(model)
    config.vocab_size = model.padded_vocab_size
    plain = LadderForCausalLM(config).float()
    weights = dict(megatron_to_hf(load_weights(folder / "weights"), config))
    missing, unexpected = plain.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    plain.tie_weights()
    return plain


@pytest.mark.parametrize(("kind", "tp"), kinds_and_ranks(SOME_RANKS))
def test_logits_and_gradients_match_the_oracle(kind: str, tp: int, tmp_path: Path) -> None:
    by_rank = run_ranks(tp, run_variants, kind, tp, tmp_path, tmp_path=tmp_path)
    batch = tokens()
    for i, model in enumerate(variants(kind)):
        folder = tmp_path / str(i)
        plain = oracle(model, folder)
        expected = plain(batch[:, :-1]).logits
        for logits in by_rank:
            torch.testing.assert_close(
                logits[i], expected[..., :VOCAB], atol=LOGITS_TOLERANCE, rtol=0
            )
        loss = torch.nn.functional.cross_entropy(expected.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        gradients = dict(megatron_to_hf(load_weights(folder / "gradients"), plain.config))
        parameters = dict(plain.named_parameters())
        assert set(gradients) - set(parameters) <= {"lm_head.weight"}  # tied
        for name, parameter in parameters.items():
            torch.testing.assert_close(
                gradients[name],
                parameter.grad,
                atol=GRADIENT_TOLERANCE,
                rtol=1e-4,
                msg=lambda m, name=name: f"{name}: {m}",
            )


@pytest.mark.parametrize(
    ("kind", "tp"),
    kinds_and_ranks({"standard": (2,), "parallel": (1,), "ladder": (2,), "parallel-ladder": (1,)}),
)
def test_the_exported_folder_gives_the_same_logits(kind: str, tp: int, tmp_path: Path) -> None:
    model = variants(kind)[3]  # GQA, untied, scaled RoPE
    by_rank = run_ranks(tp, run_model, model, tp, tmp_path, tmp_path=tmp_path)
    folder = export_folder(
        load_weights(tmp_path / "weights"),
        to_hf_config(model, eod_id=2),
        train_sentencepiece(tmp_path, "bpe"),
        tmp_path / "exported",
        dtype=torch.float32,
    )
    remote = {} if kind == "standard" else {"trust_remote_code": True}
    loaded = AutoModelForCausalLM.from_pretrained(folder, **remote)
    assert isinstance(loaded, LlamaForCausalLM) == (kind == "standard")
    with torch.no_grad():
        expected = loaded(tokens()[:, :-1]).logits
    for logits in by_rank:
        torch.testing.assert_close(logits, expected, atol=LOGITS_TOLERANCE, rtol=0)


@pytest.mark.parametrize("tp", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_standard_matches_transformers_own_llama(tp: int, tmp_path: Path) -> None:
    by_rank = run_ranks(tp, run_variants, "standard", tp, tmp_path, tmp_path=tmp_path)
    for i, model in enumerate(variants("standard")):
        ours = to_hf_config(model)
        llama = LlamaForCausalLM(standard_config(ours)).float()
        weights = dict(megatron_to_hf(load_weights(tmp_path / str(i) / "weights"), ours))
        llama.load_state_dict(weights, strict=False)
        llama.tie_weights()
        with torch.no_grad():
            expected = llama(tokens()[:, :-1]).logits
        torch.testing.assert_close(by_rank[0][i], expected, atol=LOGITS_TOLERANCE, rtol=0)
