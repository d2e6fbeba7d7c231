"""All-reduces in int8: their error is bounded, they run behind what follows, models go on working."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_ladder.collectives import quantised_sum
from megatron_ladder.config import ModelConfig, ParallelConfig
from megatron_ladder.errors import UserError
from megatron_ladder.inference.engine import DynamicEngine, generate_static
from megatron_ladder.inference.sums import check_all_reduce, set_all_reduce
from tests.distributed.test_inference import (
    NO_EOD,
    finish,
    load,
    prompts,
    requests,
    save_weights,
    tiny,
)
from tests.ranks import run_ranks


def part(rank: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Sub-modules' outputs have channels that are far larger than the others."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(rank))
    x[..., :3] *= 50
    return x


def sums(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's sum, and the largest error that rounding allows for each number."""
    ranks = dist.get_world_size()
    x = part(dist.get_rank(), shape).to(dtype)
    work = quantised_sum.start(x, dist.group.WORLD)
    work.wait()
    parts = [part(rank, shape).to(dtype).float() for rank in range(ranks)]
    each = -(-x.numel() // (ranks * quantised_sum.GROUP)) * quantised_sum.GROUP
    pad = ranks * each - x.numel()

    def half_scales(y: torch.Tensor) -> torch.Tensor:
        groups = torch.nn.functional.pad(y.flatten(), (0, pad)).view(-1, quantised_sum.GROUP)
        largest = groups.abs().amax(-1, keepdim=True).expand_as(groups)
        return largest.flatten()[: x.numel()].view(shape) / 127 / 2

    once = torch.stack([half_scales(y) for y in parts]).sum(0)
    # The sum that is rounded again has those errors in it already.
    again = half_scales(torch.stack(parts).sum(0)) + half_scales(once)
    error = (x.float() - torch.stack(parts).sum(0)).abs()
    if dtype == torch.bfloat16:
        error -= x.float().abs() * 2**-8
    assert (error <= (once + again) * 1.001).all(), (error / (once + again)).max()
    return x, error


@pytest.mark.parametrize("ranks", [2, 4])
def test_errors_are_within_rounding_and_ranks_agree(ranks: int, tmp_path: Path) -> None:
    for shape, dtype in (((1, 2, 96), torch.float32), ((5, 3, 200), torch.bfloat16)):
        results = run_ranks(ranks, sums, shape, dtype, tmp_path=tmp_path)
        for x, error in results:
            assert torch.equal(x, results[0][0])
            assert error.max() > 0, "nothing was rounded"


def start_before_the_other_rank() -> float:
    """Rank 1 starts only after word from rank 0, which rank 0 sends between its start and its wait."""
    words = dist.new_group(timeout=timedelta(seconds=60))
    rank, word, x = dist.get_rank(), torch.zeros(1), torch.ones(256)
    if rank == 1:
        dist.recv(word, src=0, group=words)
    work = quantised_sum.start(x, dist.group.WORLD)
    if rank == 0:
        dist.send(word, dst=1, group=words)
    work.wait()
    assert torch.allclose(x, torch.full_like(x, 2.0))
    return x[0].item()


def test_a_start_does_not_wait_for_the_others(tmp_path: Path) -> None:
    """A start that waited would hang: the other rank has not begun."""
    assert len(run_ranks(2, start_before_the_other_rank, tmp_path=tmp_path)) == 2


def test_int8_is_exact_where_it_can_be_and_says_what_is_no_number() -> None:
    x = torch.arange(-127.0, 129.0).clamp_max(127).view(2, 128)
    assert torch.equal(quantised_sum.from_int8(quantised_sum.to_int8(x)), x)
    zeros = torch.zeros(3, 256)
    assert torch.equal(quantised_sum.from_int8(quantised_sum.to_int8(zeros)), zeros)
    packed = quantised_sum.to_int8(zeros)
    assert packed.shape == (3, 256 + 8) and packed.dtype == torch.uint8
    for wrong in (float("nan"), float("inf")):
        y = torch.ones(1, 256)
        y[0, 5] = wrong
        back = quantised_sum.from_int8(quantised_sum.to_int8(y))
        assert back[0, :128].isnan().all() and torch.equal(back[0, 128:], y[0, 128:])


def generate(model: ModelConfig, folder: Path) -> tuple[Any, ...]:
    """Logits of a prompt, exact and with int8 sums; and int8's tokens by both engines."""
    gpt = load(model, 2, 1, folder)
    ids = torch.tensor(prompts()[:1])
    positions = torch.arange(ids.size(1))[None]
    both = []
    for all_reduce in ("exact", "int8"):
        set_all_reduce(gpt.decoder, all_reduce)
        with torch.no_grad():
            both.append(gpt(ids, positions, None, runtime_gather_output=True))
    static = generate_static(gpt, model, requests(), end_ids=[NO_EOD])
    engine = DynamicEngine(gpt, model, end_ids=[NO_EOD], max_requests=3)
    for request in requests():
        engine.add(request)
    return (*both, static, finish(engine))


@pytest.mark.parametrize(
    "kind",
    ["parallel-ladder", *(pytest.param(k, marks=pytest.mark.slow) for k in ("ladder", "parallel"))],
)
def test_a_model_with_int8_sums(kind: str, tmp_path: Path) -> None:
    model, folder = tiny(kind), tmp_path / "weights"
    run_ranks(1, save_weights, model, folder, tmp_path=tmp_path)
    results = run_ranks(2, generate, model, folder, tmp_path=tmp_path)
    exact, int8, *_ = results[0]
    error = (int8 - exact).norm() / exact.norm()
    assert 0 < error < 0.05
    _, _, first_static, first_dynamic = results[0]
    # The engine's logits are those of int8 sums, too.
    likeliest = int8[0, -1, : model.vocab_size].argmax().item()
    assert first_static[0][0] == first_dynamic[0][0] == likeliest
    for _, logits, static, dynamic in results:
        assert torch.equal(logits, int8)
        assert (static, dynamic) == (first_static, first_dynamic), "ranks disagree"
        assert len(dynamic) == len(requests())
        assert all(len(tokens) == 24 for tokens in static)


def test_where_they_have_no_place() -> None:
    two = ParallelConfig(tensor_model_parallel_size=2)
    check_all_reduce("int8", tiny("ladder"), two)
    check_all_reduce("int8", tiny("last-n"), two)
    check_all_reduce("int8", tiny("parallel-ladder"), two)
    check_all_reduce("exact", tiny("standard"), ParallelConfig())
    with pytest.raises(UserError, match="for ladder and parallel models: this one is standard"):
        check_all_reduce("int8", tiny("standard"), two)
    with pytest.raises(UserError, match="one tensor-parallel rank sums nothing"):
        check_all_reduce("int8", tiny("ladder"), ParallelConfig())
