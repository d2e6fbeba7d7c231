"""Ranges of flattened parameters as rectangles: they hold each value once, at its place."""

import itertools
import random

import pytest
import torch
from megatron.core.dist_checkpointing import ShardedTensor

from pretrain.optim.shards import _rectangles


def stored(key: str, shape: tuple[int, ...], offset: tuple[int, ...], whole: tuple[int, ...]):
    """A parameter, or a piece of it, at an offset of the whole tensor; without data."""
    return ShardedTensor(
        key, None, torch.float32, shape, whole, offset, None, (0, 0, 3), len(whole) - len(shape)
    )


@pytest.mark.parametrize("ranks", [1, 2, 3, 7, 30, 200])
@pytest.mark.parametrize("shape", [(1,), (13,), (1, 13), (13, 1), (6, 10), (10, 6)])
@pytest.mark.parametrize("pieces", [1, 2])
def test_any_cut_of_a_parameter_is_put_together_again(
    ranks: int, shape: tuple[int, ...], pieces: int
) -> None:
    # Layer 2 of 3, tensor rank 1 of 2: the second half of the rows of each piece.
    whole = torch.full((3, 2 * pieces * shape[0], *shape[1:]), -1.0)
    parameter = torch.arange(float(pieces * torch.Size(shape).numel()))
    parts = [
        stored(
            "w",
            shape,
            (1, (2 * piece + 1) * shape[0], *(0,) * (len(shape) - 1)),
            tuple(whole.shape),
        )
        for piece in range(pieces)
    ]
    generator = random.Random(ranks)
    inner = sorted(generator.choices(range(len(parameter) + 1), k=ranks - 1))
    for start, end in itertools.pairwise([0, *inner, len(parameter)]):
        found = list(_rectangles(parameter[start:end], start, end, parts, "state."))
        assert len(found) <= 3 * pieces
        assert sum(shard.data.numel() for shard in found) == end - start
        for shard in found:
            assert (shard.key, shard.replica_id) == ("state.w", (0, 0, 0))
            place = tuple(
                slice(o, o + n) for o, n in zip(shard.global_offset, shard.local_shape, strict=True)
            )
            assert (whole[place] == -1).all(), "stored twice"
            whole[place] = shard.data
            assert shard.data.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()
    mine = torch.cat(
        [whole[1, (2 * p + 1) * shape[0] :][: shape[0]].flatten() for p in range(pieces)]
    )
    assert torch.equal(mine, parameter)
    assert (whole == -1).sum() == whole.numel() - len(parameter)
