"""The table of weights: megatron-core's names and shapes in checkpoints, and Hugging Face's in them.

Both sides have whole tensors, not shards. megatron-core stacks the layers on axis 0, and of experts the
experts of a layer on the next axis:

    embedding.word_embeddings.weight                              [padded_vocab, h]
    decoder.layers.self_attention.linear_qkv.layer_norm_weight    [L, h], absent without layer_norms
    decoder.layers.self_attention.linear_qkv.weight               [L, (heads + 2 groups) head_dim, h]
    decoder.layers.self_attention.linear_qkv.bias                 [L, (heads + 2 groups) head_dim], Qwen2's
    decoder.layers.self_attention.q_layernorm.weight              [L, head_dim], Qwen3's; and k_layernorm
    decoder.layers.self_attention.linear_proj.weight              [L, h, heads head_dim]
    decoder.layers.mlp.linear_fc1.layer_norm_weight               [L, h], absent when parallel, too
    decoder.layers.mlp.linear_fc1.weight                          [L, 2 ffn, h]
    decoder.layers.mlp.linear_fc2.weight                          [L, h, ffn]
    decoder.layers.residual_scales                                [L, 2], of skipinit; [L, 1] when parallel
    decoder.final_layernorm.weight                                [h]
    output_layer.weight                                           [padded_vocab, h], absent when tied

A layer of E experts has in place of its mlp:

    decoder.layers.pre_mlp_layernorm.weight                       [L, h], absent when parallel
    decoder.layers.mlp.router.weight                              [L, E, h]
    decoder.layers.mlp.router.expert_bias                         [L, E], fp32
    decoder.layers.mlp.experts.experts.linear_fc1.weight          [L, E, 2 width, h]
    decoder.layers.mlp.experts.experts.linear_fc2.weight          [L, E, h, width]
    decoder.layers.mlp.shared_experts.linear_fc1.weight           [L, 2 width, h]
    decoder.layers.mlp.shared_experts.linear_fc2.weight           [L, h, width]

megatron-core's local experts and Transformer Engine's grouped ones have the same names. If some layers have
experts and some an mlp, then no tensor is stacked over layers: all names have the layer's number,
`decoder.layers.3.mlp.router.weight`, and the axis L is not there.

The rows of linear_qkv are ordered by query group: the group's query heads, its key head, its value head.
The rows of linear_fc1 are those of the gate projection, then those of the up projection. RoPE pairs the
same channels on both sides, so no row moves within a head.

A side network (megatron_ladder/side) has these too, with K blocks of h / r channels:

    side.first.weight, side.up.weight                             [h/r, h], [h, h/r]
    side.rungs.gate, side.rungs.down.weight                       [K, 1], [K, h/r, h]
    side.blocks.decoder.layers. ...                               as above, of K layers
"""

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from megatron_ladder.hf.modelling.configuration_ladder import PARALLELS, LadderConfig
from megatron_ladder.hf.modelling.modeling_side import LadderSideConfig

_LAYERS = "decoder.layers."
_OF_EXPERTS = ".experts.experts."
_Shapes = dict[str, tuple[int, ...]]


def stacked_axes(megatron: str) -> int:
    """How many of a megatron-core tensor's first axes are those of layers and experts."""
    of_layers = re.search(r"decoder\.layers\.(?!\d)", megatron) is not None
    return of_layers + (_OF_EXPERTS in megatron)


@dataclass(frozen=True)
class Entry:
    """A megatron-core tensor, and the Hugging Face tensors in it (in one place of it, if stacked)."""

    megatron: str
    hugging_face: Mapping[str, tuple[int, ...]]  # shapes by name; it has {} for each stacked axis
    of: LadderConfig  # has its heads and layers
    stacked: tuple[int, ...] = ()  # the sizes of its first axes: layers, experts
    layers: bool = False  # the first of these is that of layers
    vocabulary: bool = False  # megatron-core pads its rows

    @property
    def places(self) -> Iterator[tuple[int, ...]]:
        """The numbers of the layer and the expert of each part, as far as these are stacked."""
        return itertools.product(*map(range, self.stacked))

    def names(self, place: tuple[int, ...]) -> list[str]:
        """Hugging Face's names of one part."""
        return [name.format(*place) for name in self.hugging_face]

    def megatron_shape(self, padded_vocab_size: int) -> tuple[int, ...]:
        shapes = list(self.hugging_face.values())
        rows = padded_vocab_size if self.vocabulary else sum(shape[0] for shape in shapes)
        return (*self.stacked, rows, *shapes[0][1:])


def entries(config: LadderConfig) -> list[Entry]:
    """The only map of names, in the order in which Hugging Face lists its tensors."""
    h, vocab = config.hidden_size, config.vocab_size
    table = {"model.embed_tokens.weight": (vocab, h)}
    found = [
        Entry("embedding.word_embeddings.weight", table, config, vocabulary=True),
        *_of_layers(config, _LAYERS, "model.layers."),
        Entry("decoder.final_layernorm.weight", {"model.norm.weight": (h,)}, config),
    ]
    if not config.tie_word_embeddings:
        head = {"lm_head.weight": (vocab, h)}
        found.append(Entry("output_layer.weight", head, config, vocabulary=True))
    if isinstance(config, LadderSideConfig):
        blocks, name = config.blocks(), "model.side.blocks."
        small, count = blocks.hidden_size, (blocks.num_hidden_layers,)
        first, up = (
            {f"model.side.{end}.weight": shape}
            for end, shape in (("first", (small, h)), ("up", (h, small)))
        )
        down = {f"{name}{{}}.down.weight": (small, h)}
        found += [
            Entry("side.first.weight", first, config),
            Entry("side.rungs.gate", {f"{name}{{}}.gate": (1,)}, blocks, count, layers=True),
            Entry("side.rungs.down.weight", down, blocks, count, layers=True),
            *_of_layers(blocks, f"side.blocks.{_LAYERS}", name, ".layer"),
            Entry("side.up.weight", up, config),
        ]
    return found


def _of_layers(config: LadderConfig, layers: str, name: str, within: str = "") -> list[Entry]:
    """The map of a stack of layers.

    Args:
        layers: what megatron-core's names begin with.
        name: what Hugging Face's begin with, up to the layer's number.
        within: what they have behind the number.
    """
    count, with_experts = config.num_hidden_layers, config.expert_layers()
    if with_experts and len(with_experts) < count:
        return [
            entry
            for i in range(count)
            for entry in _of_layer(
                config, f"{layers}{i}.", f"{name}{i}{within}.", i in with_experts
            )
        ]
    return _of_layer(config, layers, f"{name}{{}}{within}.", bool(with_experts), (count,))


def _of_layer(
    config: LadderConfig, megatron: str, name: str, experts: bool, stacked: tuple[int, ...] = ()
) -> list[Entry]:
    """The map of one layer, or of all, if they are stacked."""
    h, q = config.hidden_size, config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    qkv = {
        "self_attn.q_proj.weight": (q, h),
        "self_attn.k_proj.weight": (kv, h),
        "self_attn.v_proj.weight": (kv, h),
    }
    tensors: dict[str, _Shapes] = {}
    if config.layer_norms:
        tensors["self_attention.linear_qkv.layer_norm_weight"] = {"input_layernorm.weight": (h,)}
    tensors["self_attention.linear_qkv.weight"] = dict(qkv)
    if config.qkv_bias:
        biases = {n.replace("weight", "bias"): (rows,) for n, (rows, _) in qkv.items()}
        tensors["self_attention.linear_qkv.bias"] = dict(biases)
    if config.qk_norm:
        for one in "qk":
            norm = {f"self_attn.{one}_norm.weight": (config.head_dim,)}
            tensors[f"self_attention.{one}_layernorm.weight"] = dict(norm)
    tensors["self_attention.linear_proj.weight"] = {"self_attn.o_proj.weight": (h, q)}
    if config.layer_norms and config.residual not in PARALLELS:
        norm_name = "pre_mlp_layernorm.weight" if experts else "mlp.linear_fc1.layer_norm_weight"
        tensors[norm_name] = {"post_attention_layernorm.weight": (h,)}
    tensors |= _experts(config) if experts else _mlp("mlp", "mlp", h, config.intermediate_size)
    if config.residual_scaling == "skipinit":
        tensors["residual_scales"] = {
            "residual_scales": (1 if config.residual in PARALLELS else 2,)
        }
    found = []
    for theirs, ours in tensors.items():
        per_expert = (config.num_experts or 0,) if _OF_EXPERTS in theirs else ()
        named = {name + of_layer: shape for of_layer, shape in ours.items()}
        axes = stacked + per_expert
        found.append(Entry(megatron + theirs, named, config, axes, layers=bool(stacked)))
    return found


def _mlp(megatron: str, hugging_face: str, hidden: int, width: int) -> dict[str, _Shapes]:
    return {
        f"{megatron}.linear_fc1.weight": {
            f"{hugging_face}.gate_proj.weight": (width, hidden),
            f"{hugging_face}.up_proj.weight": (width, hidden),
        },
        f"{megatron}.linear_fc2.weight": {f"{hugging_face}.down_proj.weight": (hidden, width)},
    }


def _experts(config: LadderConfig) -> dict[str, _Shapes]:
    h, count = config.hidden_size, config.num_experts or 0
    width = config.moe_intermediate_size or config.intermediate_size
    tensors: dict[str, _Shapes] = {"mlp.router.weight": {"mlp.gate.weight": (count, h)}}
    if config.expert_bias:
        tensors["mlp.router.expert_bias"] = {"mlp.gate.e_score_correction_bias": (count,)}
    tensors |= _mlp("mlp.experts.experts", "mlp.experts.{}", h, width)
    if shared := config.shared_expert_intermediate_size:
        tensors |= _mlp("mlp.shared_experts", "mlp.shared_experts", h, shared)
    return tensors
