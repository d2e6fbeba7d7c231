"""Greedy generation: megatron-core's model, recomputed for each token, and the exported folder in
transformers give the same tokens."""

from pathlib import Path

import pytest
import torch
from megatron.core import parallel_state
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_ladder.config import ModelConfig, ParallelConfig
from megatron_ladder.hf.export import export_folder
from megatron_ladder.hf.model_config import to_hf_config
from megatron_ladder.mcore_compat import (
    build_gpt_model,
    initialize_model_parallel,
    transformer_config,
)
from pretrain.run.checkpoint import load_weights
from tests.distributed.test_parity import (
    LOGITS_TOLERANCE,
    VOCAB,
    kinds_and_ranks,
    save_model,
    variants,
)
from tests.ranks import run_ranks
from tests.unit.hf.tiny import train_sentencepiece

NEW = 16
LENGTHS = (5, 12, 8)


def prompts() -> list[Tensor]:
    draw = torch.Generator().manual_seed(3)
    return [torch.randint(3, VOCAB, (1, length), generator=draw) for length in LENGTHS]


def generate(model: ModelConfig, tp: int, folder: Path) -> list[tuple[list[int], float]]:
    """On each rank, for each prompt: the new tokens, and the least lead of a token over the next best.

    The weights, large enough that the tokens vary, go to `folder`.
    """
    parallel = ParallelConfig(tensor_model_parallel_size=tp)
    parallel_state.destroy_model_parallel()
    initialize_model_parallel(parallel, seed=0)
    (gpt,) = build_gpt_model(model, transformer_config(model, parallel))
    same = torch.Generator().manual_seed(2)
    own = torch.Generator().manual_seed(10 + torch.distributed.get_rank())
    with torch.no_grad():
        for name, parameter in gpt.named_parameters():
            if "norm" in name or "scales" in name:
                parameter.uniform_(0.5, 1.5, generator=same)
            else:  # each rank has a part of it
                parameter.normal_(std=0.25, generator=own)
    save_model(gpt, folder)
    gpt.eval()
    return [greedy(gpt, tp, prompt) for prompt in prompts()]


@torch.no_grad()
def greedy(gpt: torch.nn.Module, tp: int, prompt: Tensor) -> tuple[list[int], float]:
    ids, lead = prompt, float("inf")
    for _ in range(NEW):
        local = gpt(ids, torch.arange(ids.shape[1])[None], None)[:, -1].contiguous()
        parts = [torch.empty_like(local) for _ in range(tp)]
        group = parallel_state.get_tensor_model_parallel_group()
        torch.distributed.all_gather(parts, local, group=group)
        best = torch.cat(parts, dim=-1)[0, :VOCAB].topk(2)
        lead = min(lead, float(best.values[0] - best.values[1]))
        ids = torch.cat([ids, best.indices[:1, None]], dim=1)
    return ids[0, -NEW:].tolist(), lead


@pytest.mark.parametrize(
    ("kind", "tp"),
    kinds_and_ranks({"standard": (1,), "parallel-ladder": (2,), "ladder": (2,), "last-n": (2,)}),
)
def test_greedy_tokens_are_the_same(kind: str, tp: int, tmp_path: Path) -> None:
    model = variants(kind)[3]  # GQA, untied, scaled RoPE
    by_rank = run_ranks(tp, generate, model, tp, tmp_path / "weights", tmp_path=tmp_path)
    assert all(rank == by_rank[0] for rank in by_rank)
    expected = [tokens for tokens, _ in by_rank[0]]
    lead = min(lead for _, lead in by_rank[0])
    assert lead > 2 * LOGITS_TOLERANCE, "a near-tie, which rounding decides: draw other weights"
    assert all(len(set(tokens)) > 5 for tokens in expected), (
        "a model that repeats itself proves little"
    )

    folder = export_folder(
        load_weights(tmp_path / "weights"),
        to_hf_config(model, eod_id=2),
        train_sentencepiece(tmp_path, "bpe"),
        tmp_path / "exported",
        dtype=torch.float32,
    )
    exported = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=kind != "standard")
    how = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    longest = max(LENGTHS)
    batch = torch.zeros(len(LENGTHS), longest, dtype=torch.long)
    mask = torch.zeros_like(batch)
    for row, prompt in enumerate(prompts()):
        batch[row, longest - prompt.shape[1] :] = prompt[0]
        mask[row, longest - prompt.shape[1] :] = 1
    for cache in (
        {"use_cache": False},
        {"cache_implementation": "dynamic"},
        {"cache_implementation": "static"},
    ):
        alone = [exported.generate(p, **cache, **how)[0, -NEW:].tolist() for p in prompts()]
        assert alone == expected, cache
        together = exported.generate(batch, attention_mask=mask, **cache, **how)
        assert together[:, longest:].tolist() == expected, cache
