"""The first weights of a side network: its backbone's most important channels (arXiv 2206.06522).

A side network has its backbone's shape with fewer channels. The importance of the weights that read or
write a channel decides whether it stays: their squared gradients (empirical Fisher information), or their
magnitudes. Four choices are made:

    states     one set for the whole model: blocks add to one residual stream
    queries    one set of RoPE's pairs for each layer; of keys the same
    values     one set for each layer
    MLP        in each layer, of `reduction` neighbours the most important one, so that the channels stay on
               their tensor-parallel ranks

The paper chooses the rows of each matrix for themselves, and starts its projections at random. With one set
for the stream, the down-projections can start as that choice, and the up-projection puts it back in place.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_ladder.side.model import SideTunedModel

WEIGHTS = (
    "self_attention.linear_qkv.weight",
    "self_attention.linear_proj.weight",
    "mlp.linear_fc1.weight",
    "mlp.linear_fc2.weight",
)
"""The matrices of a layer. Their importance decides."""


class Importance:
    """Sums of the importance of weights by channel, fp32, on this rank's device.

    Args:
        chunks: this rank's.
    """

    def __init__(self, chunks: list[SideTunedModel]) -> None:
        config = chunks[0].backbone.decoder.config
        self._channels = config.kv_channels
        self._per_group = config.num_attention_heads // config.num_query_groups
        device: Any = torch.cuda.current_device()
        self.states = torch.zeros(config.hidden_size, device=device)
        self.queries: dict[int, Tensor] = {}  # by layer, [head_dim / 2]
        self.values: dict[int, Tensor] = {}  # by layer, [head_dim]
        self.mlp: dict[int, Tensor] = {}  # by layer, [ffn / tp]
        ffn = config.ffn_hidden_size // config.tensor_model_parallel_size
        for number, _ in layers_of(chunks):
            self.queries[number] = torch.zeros(self._channels // 2, device=device)
            self.values[number] = torch.zeros(self._channels, device=device)
            self.mlp[number] = torch.zeros(ffn, device=device)

    @torch.no_grad()
    def add(self, layer: int, name: str, scores: Tensor) -> None:
        """Adds the importance of one of WEIGHTS.

        Args:
            layer: from 0.
            scores: of each weight, in the weight's shape.
        """
        scores = scores.float()
        self.states += scores.sum(1 if name.endswith(("proj.weight", "fc2.weight")) else 0)
        if name.endswith("qkv.weight"):
            rows = scores.sum(1).view(-1, self._per_group + 2, self._channels)
            turned = rows[:, :-1].sum((0, 1))
            self.queries[layer] += turned.view(2, -1).sum(0)
            self.values[layer] += rows[:, -1].sum(0)
        elif name.endswith("proj.weight"):
            self.values[layer] += scores.sum(0).view(-1, self._channels).sum(0)
        elif name.endswith("fc1.weight"):
            self.mlp[layer] += scores.sum(1).view(2, -1).sum(0)
        else:
            self.mlp[layer] += scores.sum(0)

    def sum_over_ranks(self, *, over_data: bool) -> None:
        """Called by all ranks.

        Args:
            over_data: each data-parallel rank has added the importance on its own data.
        """
        tp = parallel_state.get_tensor_model_parallel_group()
        pp = parallel_state.get_pipeline_model_parallel_group()
        heads = [*self.queries.values(), *self.values.values()]
        for tensor in (self.states, *heads):
            dist.all_reduce(tensor, group=tp)
        dist.all_reduce(self.states, group=pp)
        if over_data:
            group = parallel_state.get_data_parallel_group()
            for tensor in (self.states, *heads, *self.mlp.values()):
                dist.all_reduce(tensor, group=group)


def layers_of(chunks: list[SideTunedModel]) -> Iterator[tuple[int, Any]]:
    """This rank's layers of the backbone, with their numbers from 0."""
    for chunk in chunks:
        for layer in chunk.backbone.decoder.layers:
            yield layer.layer_number - 1, layer


def magnitudes(chunks: list[SideTunedModel]) -> Importance:
    """The importance of the backbone's weights by their magnitude. Called by all ranks."""
    found = Importance(chunks)
    for number, layer in layers_of(chunks):
        for name in WEIGHTS:
            found.add(number, name, layer.get_parameter(name).abs())
    found.sum_over_ranks(over_data=False)
    return found


@torch.no_grad()
def prune(chunks: list[SideTunedModel], importance: Importance) -> None:
    """Gives the side network the most important channels of the backbone.

    Args:
        importance: after `sum_over_ranks`.
    """
    for chunk in chunks:
        side, config = chunk.side, chunk.side.config
        states = _most(importance.states, config.hidden_size)
        chosen = torch.eye(len(importance.states), device=states.device)[states]
        if side.first is not None:
            side.first.weight.copy_(chosen)
        if side.up is not None:
            side.up.weight.copy_(chosen.t())
        backbone = dict(layers_of([chunk]))
        for number, rung, block in zip(
            side.layers, side.rungs, side.blocks.decoder.layers, strict=True
        ):
            rung.down.weight.copy_(chosen)  # type: ignore[operator, union-attr]
            pairs = _most(importance.queries[number], config.kv_channels // 2)
            groups = importance.mlp[number].view(-1, _reduction(chunk))
            neighbours = torch.arange(len(groups), device=states.device) * groups.size(1)
            _prune_layer(
                block,
                backbone[number],
                states,
                torch.cat((pairs, pairs + len(importance.queries[number]))),
                _most(importance.values[number], config.kv_channels),
                neighbours + groups.argmax(1),
            )


def _reduction(chunk: SideTunedModel) -> int:
    return chunk.backbone.decoder.config.ffn_hidden_size // chunk.side.config.ffn_hidden_size


def _most(importance: Tensor, count: int) -> Tensor:
    """The most important channels, ascending."""
    return importance.topk(count).indices.sort().values


def _prune_layer(
    block: Any, layer: Any, states: Tensor, turned: Tensor, values: Tensor, mlp: Tensor
) -> None:
    """Copies channels of a layer of the backbone into a block.

    Args:
        states, turned, values, mlp: the channels that stay: of states, of queries and keys, of values, and
            of this rank's part of the MLP.
    """
    config, attention = layer.config, layer.self_attention
    heads = (-1, config.num_attention_heads // config.num_query_groups + 2, config.kv_channels)
    first, second = _norms(layer)
    for ours, theirs in zip(
        _norms(block), (first, first if second is None else second), strict=True
    ):
        ours.copy_(theirs[states])

    def qkv(x: Tensor) -> Tensor:
        """[groups, queries of a group + 2, head_dim, ...] with fewer channels, as rows."""
        return torch.cat((x[:, :-1, turned], x[:, -1:, values]), dim=1).flatten(0, 2)

    weight = attention.linear_qkv.weight[:, states]
    block.self_attention.linear_qkv.weight.copy_(qkv(weight.unflatten(0, heads)))
    if attention.linear_qkv.bias is not None:
        block.self_attention.linear_qkv.bias.copy_(
            qkv(attention.linear_qkv.bias.unflatten(0, heads))
        )
    for name in ("q_layernorm", "k_layernorm"):
        if (norm := getattr(getattr(attention, name), "weight", None)) is not None:
            getattr(block.self_attention, name).weight.copy_(norm[turned])
    weight = attention.linear_proj.weight[states].unflatten(1, (-1, config.kv_channels))
    block.self_attention.linear_proj.weight.copy_(weight[:, :, values].flatten(1))
    weight = layer.mlp.linear_fc1.weight[:, states].unflatten(0, (2, -1))
    block.mlp.linear_fc1.weight.copy_(weight[:, mlp].flatten(0, 1))
    block.mlp.linear_fc2.weight.copy_(layer.mlp.linear_fc2.weight[states][:, mlp])


def _norms(layer: Any) -> tuple[Any, Any]:
    """The weights of a layer's two norms, which Transformer Engine may fuse with linears. None: parallel
    kinds have one."""
    found: list[Any] = []
    for norm, linear in (
        (layer.input_layernorm, layer.self_attention.linear_qkv),
        (layer.pre_mlp_layernorm, layer.mlp.linear_fc1),
    ):
        fused = getattr(linear, "layer_norm_weight", None)
        found.append(getattr(norm, "weight", fused))
    return found[0], found[1]
