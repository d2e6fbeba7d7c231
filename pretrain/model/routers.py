"""The routers of a mixture of experts: how evenly they send tokens, and their biases."""

import math
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor


def routers_of(model: list[Any]) -> list[Any]:
    """This rank's routers (CountingRouter), of the layers that have experts.

    Args:
        model: chunks in DDP.
    """
    if model[0].config.num_moe_experts is None:  # each step asks: a dense model answers at once
        return []
    layers = (layer for chunk in model for layer in chunk.module.decoder.layers)
    return [layer.mlp.router for layer in layers if layer.is_moe_layer]


def biases_of(model: list[Any]) -> list[tuple[Tensor, Tensor]]:
    """Each expert bias of this rank, and a copy of it. Backward moves the biases before it is known
    whether the step counts: `restore` takes that back."""
    found = [router.expert_bias for router in routers_of(model)]
    return [(bias, bias.clone()) for bias in found if bias is not None]


def restore(biases: list[tuple[Tensor, Tensor]]) -> None:
    """Gives the biases the values that they had when `biases_of` copied them."""
    for bias, before in biases:
        bias.copy_(before)


@torch.no_grad()
def load_balance(model: list[Any], num_layers: int) -> dict[str, Any]:
    """How evenly the experts were used since the last call. All ranks call it and get the same.

    Args:
        model: chunks in DDP.
        num_layers: of the whole model.

    Returns:
        "expert_imbalance": the tokens of a layer's most used expert over the mean of its experts, of the
        layer in which that is largest; 1 is even. "expert_imbalance_by_layer": the same of each layer, None
        for one without experts. "dropped_share": of all choices of an expert by a token, the share that was
        dropped. "router_entropy": the mean entropy of a token's scores, of all layers, over that of equal
        scores: 1 where every expert has the same score, near 0 where one has all. {} for a model without
        experts.
    """
    experts = model[0].config.num_moe_experts
    if experts is None:
        return {}
    here = torch.cuda.current_device()
    counts = torch.zeros(num_layers, 3, experts, dtype=torch.float64, device=here)
    for router in routers_of(model):
        of_layer = (router.tokens_chosen, router.tokens_dropped, router.entropy)
        for which, count in enumerate(of_layer):  # the entropy fills its row
            counts[router.layer_number - 1, which] = count
            count.zero_()
    torch.distributed.all_reduce(counts, group=parallel_state.get_tensor_and_data_parallel_group())
    torch.distributed.all_reduce(counts, group=parallel_state.get_pipeline_model_parallel_group())
    chosen, dropped, entropy = counts.unbind(1)
    means = chosen.mean(dim=1)
    uneven = chosen.amax(dim=1) / means
    have = means > 0  # layers without experts have no tokens
    if not have.any():  # no step since
        return {}
    tokens = chosen.sum() / model[0].config.moe_router_topk
    return {
        "expert_imbalance": uneven[have].max().item(),
        "dropped_share": (dropped.sum() / chosen.sum()).item(),
        "router_entropy": (entropy[:, 0].sum() / tokens).item() / math.log(experts),
        "expert_imbalance_by_layer": [
            round(value, 4) if routed else None
            for value, routed in zip(uneven.tolist(), have.tolist(), strict=True)
        ],
    }
