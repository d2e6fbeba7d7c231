"""Converts names and layouts of weights between megatron-core's checkpoints and Hugging Face.

Both sides have whole tensors, not tensor-parallel shards. megatron-core stacks the layers on axis 0:

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

The rows of linear_qkv are ordered by query group: the group's query heads, its key head, its value head.
The rows of linear_fc1 are those of the gate projection, then those of the up projection. RoPE pairs the
same channels on both sides, so no row moves within a head.

A side network (megatron_ladder/side) has these too, with K blocks of h / r channels:

    side.first.weight, side.up.weight                             [h/r, h], [h, h/r]
    side.rungs.gate, side.rungs.down.weight                       [K, 1], [K, h/r, h]
    side.blocks.decoder.layers. ...                               as above, of K layers

A tensor may be an object that reads its data only when needed. It must have `shape`, `dtype`, and
`tensor[layer]` or `tensor[:]`, which return a torch.Tensor.
"""

import copy
import functools
import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_ladder.hf.modelling.configuration_ladder import PARALLELS, LadderConfig
from megatron_ladder.hf.modelling.modeling_side import LadderSideConfig

_LAYERS = "decoder.layers."
# A sub-module's output is what its last linear gives.
_LAST_LINEARS = ("self_attn.o_proj.weight", "mlp.down_proj.weight")


@dataclass(frozen=True)
class _Entry:
    """A megatron-core tensor, and the Hugging Face tensors in it (in one layer of it, if stacked)."""

    megatron: str
    hugging_face: Mapping[str, tuple[int, ...]]  # name, without `layer_name` -> shape
    of: LadderConfig  # has its heads and layers
    layer_name: str = (
        ""  # what Hugging Face's names begin with, if stacked, such as model.layers.{}.
    )
    vocabulary: bool = False  # megatron-core pads its rows

    @property
    def stacked(self) -> bool:
        return bool(self.layer_name)

    def full_name(self, name: str, layer: int | str) -> str:
        return self.layer_name.format(layer) + name

    @property
    def layers(self) -> range:
        return range(self.of.num_hidden_layers if self.stacked else 1)

    def megatron_shape(self, padded_vocab_size: int) -> tuple[int, ...]:
        shapes = list(self.hugging_face.values())
        rows = padded_vocab_size if self.vocabulary else sum(shape[0] for shape in shapes)
        shape = (rows, *shapes[0][1:])
        return (self.of.num_hidden_layers, *shape) if self.stacked else shape


def _entries(config: LadderConfig) -> list[_Entry]:
    """The only map of names, in the order in which Hugging Face lists its tensors."""
    h, vocab = config.hidden_size, config.vocab_size
    table = {"model.embed_tokens.weight": (vocab, h)}
    entries = [
        _Entry("embedding.word_embeddings.weight", table, config, vocabulary=True),
        *_layer_entries(config, _LAYERS, "model.layers.{}."),
        _Entry("decoder.final_layernorm.weight", {"model.norm.weight": (h,)}, config),
    ]
    if not config.tie_word_embeddings:
        head = {"lm_head.weight": (vocab, h)}
        entries.append(_Entry("output_layer.weight", head, config, vocabulary=True))
    if isinstance(config, LadderSideConfig):
        blocks, name = config.blocks(), "model.side.blocks.{}."
        small = blocks.hidden_size
        first, up = (
            {f"model.side.{end}.weight": shape}
            for end, shape in (("first", (small, h)), ("up", (h, small)))
        )
        down = {"down.weight": (small, h)}
        entries += [
            _Entry("side.first.weight", first, config),
            _Entry("side.rungs.gate", {"gate": (1,)}, blocks, name),
            _Entry("side.rungs.down.weight", down, blocks, name),
            *_layer_entries(blocks, f"side.blocks.{_LAYERS}", f"{name}layer."),
            _Entry("side.up.weight", up, config),
        ]
    return entries


def _layer_entries(config: LadderConfig, layers: str, name: str) -> list[_Entry]:
    """The map of a stack of layers.

    Args:
        layers: what megatron-core's names begin with.
        name: as `_Entry.layer_name`.
    """
    h, ffn = config.hidden_size, config.intermediate_size
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    qkv = {
        "self_attn.q_proj.weight": (q, h),
        "self_attn.k_proj.weight": (kv, h),
        "self_attn.v_proj.weight": (kv, h),
    }
    tensors: dict[str, dict[str, tuple[int, ...]]] = {}
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
        tensors["mlp.linear_fc1.layer_norm_weight"] = {"post_attention_layernorm.weight": (h,)}
    tensors["mlp.linear_fc1.weight"] = {
        "mlp.gate_proj.weight": (ffn, h),
        "mlp.up_proj.weight": (ffn, h),
    }
    tensors["mlp.linear_fc2.weight"] = {"mlp.down_proj.weight": (h, ffn)}
    if config.residual_scaling == "skipinit":
        tensors["residual_scales"] = {
            "residual_scales": (1 if config.residual in PARALLELS else 2,)
        }
    return [_Entry(layers + megatron, theirs, config, name) for megatron, theirs in tensors.items()]


def megatron_to_hf(
    tensors: Mapping[str, Any], config: LadderConfig
) -> Iterator[tuple[str, Tensor]]:
    """Converts megatron-core's tensors to Hugging Face's.

    Values and dtypes do not change. A tensor whose rows need no new order is a view of `tensors`. The
    vocabulary's padding is cut off.

    Args:
        tensors: megatron-core's whole tensors, by name, with the layers stacked.
        config: the model's configuration.

    Returns:
        An iterator of names and tensors, in layer order.

    Raises:
        ValueError: a tensor is missing, unknown or has another shape. It is raised before the first tensor.
    """
    entries = _entries(config)
    embedding = tensors.get("embedding.word_embeddings.weight")
    padded_vocab_size = config.vocab_size if embedding is None else embedding.shape[0]
    if padded_vocab_size < config.vocab_size:
        raise ValueError(
            f"embedding.word_embeddings.weight has {padded_vocab_size} rows, fewer than the "
            f"vocabulary's {config.vocab_size}"
        )
    expected = {e.megatron: e.megatron_shape(padded_vocab_size) for e in entries}
    _check(tensors, expected, "megatron-core")

    def stream() -> Iterator[tuple[str, Tensor]]:
        for stacked, group in itertools.groupby(entries, key=lambda entry: entry.stacked):
            some = list(group)
            for layer in some[0].layers:
                for entry in some:
                    tensor = tensors[entry.megatron][layer if stacked else slice(None)]
                    yield from _split(entry, tensor, layer)

    return stream()


def scale_in_weights(
    config: LadderConfig, dtypes: Collection[torch.dtype]
) -> tuple[LadderConfig, Callable[[str, Tensor], Tensor]]:
    """Moves residual scaling into weights, where no logit changes by a bit.

    Multiplication by a power of two changes a number's exponent alone. So the outputs of linears with
    weights s W are s times those with W, bit by bit, if s is a power of two and nothing is too small for
    its dtype's exponents. Another s would round each weight, so the model keeps it.

    Args:
        config: the model's configuration.
        dtypes: of its weights, as they are stored and as they will be.

    Returns:
        The configuration of the model to write: without scaling if it was moved, else `config`. And the
        function that gives the weight to write, from its Hugging Face name and its value.
    """
    scale = config.residual_scale() or 1.0  # learned scales are no powers of two
    is_power = math.frexp(scale)[0] == 0.5
    if scale == 1 or not is_power or not set(dtypes) <= {torch.float32, torch.bfloat16}:
        return config, lambda _, weight: weight
    plain = copy.copy(config)
    plain.residual_scaling = "none"
    return plain, lambda name, weight: weight * scale if name.endswith(_LAST_LINEARS) else weight


@dataclass(frozen=True)
class Chunk:
    """A whole megatron-core tensor, or one layer of a stacked one."""

    name: str
    shape: tuple[int, ...]
    """The shape of the whole tensor, with the axis of layers."""
    dtype: torch.dtype
    layer: int | None
    """The number of the layer, from 0. None: the tensor is not stacked."""
    make: Callable[[], Tensor]
    """Reads the Hugging Face tensors and joins them. The result for one layer has no axis of layers."""


def checked_hf_tensors(state: Mapping[str, Any], config: LadderConfig) -> Mapping[str, Any]:
    """Checks Hugging Face's tensors. Their names must be those of `LadderForCausalLM`.

    Returns:
        `state`; for a tied model with the shared table as `model.embed_tokens.weight` alone.

    Raises:
        ValueError: a tensor is missing, unknown or has another shape, or the `lm_head.weight` of a tied
            model differs from its embedding.
    """
    if config.tie_word_embeddings and "lm_head.weight" in state:
        state = dict(state)
        head = state.pop("lm_head.weight")
        # Of shared tensors safetensors' writer keeps one name, which may be either.
        table = state.setdefault("model.embed_tokens.weight", head)
        if table is not head and not torch.equal(head[:], table[:]):
            raise ValueError(
                "lm_head.weight differs from model.embed_tokens.weight, but the configuration ties "
                "them: set tie_word_embeddings to false"
            )
    expected = {
        entry.full_name(name, layer): shape
        for entry in _entries(config)
        for layer in entry.layers
        for name, shape in entry.hugging_face.items()
    }
    _check(state, expected, "Hugging Face")
    return state


def hf_to_megatron_chunks(
    state: Mapping[str, Any], config: LadderConfig, padded_vocab_size: int
) -> list[Chunk]:
    """Converts Hugging Face's tensors to megatron-core's, in parts that can be made one at a time.

    The rows that pad the vocabulary are zero.

    Args:
        state: Hugging Face's tensors. The `lm_head.weight` of a tied model may be among them.
        config: the model's configuration.
        padded_vocab_size: rows of the embedding in training (`ModelConfig.padded_vocab_size`).

    Returns:
        One chunk for each layer of each stacked tensor, and one for each other tensor.

    Raises:
        ValueError: a tensor is missing, unknown or has another shape, tensors that are joined have
            different dtypes, or `padded_vocab_size` is less than the vocabulary.
    """
    if padded_vocab_size < config.vocab_size:
        raise ValueError(
            f"padded_vocab_size {padded_vocab_size} is less than vocab_size {config.vocab_size}"
        )
    state = checked_hf_tensors(state, config)
    entries = _entries(config)

    def make(entry: _Entry, layer: int) -> Tensor:
        parts = [state[entry.full_name(name, layer)][:] for name in entry.hugging_face]
        tensor = _join(parts, entry.of)
        if entry.vocabulary and len(tensor) < padded_vocab_size:
            tensor = torch.nn.functional.pad(tensor, (0, 0, 0, padded_vocab_size - len(tensor)))
        return tensor

    chunks = []
    for entry in entries:
        dtypes = {
            state[entry.full_name(name, layer)].dtype
            for layer in entry.layers
            for name in entry.hugging_face
        }
        if len(dtypes) > 1:
            raise ValueError(
                f"{entry.full_name('|'.join(entry.hugging_face), 'N')} have different dtypes: "
                f"{', '.join(sorted(map(str, dtypes)))}. A checkpoint holds them as one tensor: store "
                "them all in one dtype"
            )
        shape = entry.megatron_shape(padded_vocab_size)
        for layer in entry.layers:
            number = layer if entry.stacked else None
            makes = functools.partial(make, entry, layer)
            chunks.append(Chunk(entry.megatron, shape, next(iter(dtypes)), number, makes))
    return chunks


def hf_to_megatron(
    state: Mapping[str, Tensor], config: LadderConfig, padded_vocab_size: int
) -> dict[str, Tensor]:
    """Converts Hugging Face's tensors to megatron-core's whole tensors, by name.

    The arguments and errors are those of `hf_to_megatron_chunks`.
    """
    parts: dict[str, list[Chunk]] = {}
    for chunk in hf_to_megatron_chunks(state, config, padded_vocab_size):
        parts.setdefault(chunk.name, []).append(chunk)
    return {
        name: chunks[0].make()
        if chunks[0].layer is None
        else torch.stack([c.make() for c in chunks])
        for name, chunks in parts.items()
    }


def main_dtype(tensors: Mapping[str, Any]) -> torch.dtype:
    """The dtype of most of the elements. Norms, for example, may have another one."""
    elements: dict[torch.dtype, int] = {}
    for tensor in tensors.values():
        elements[tensor.dtype] = elements.get(tensor.dtype, 0) + math.prod(tensor.shape)
    return max(elements, key=elements.__getitem__)


def _split(entry: _Entry, tensor: Tensor, layer: int) -> Iterator[tuple[str, Tensor]]:
    """Splits a megatron-core tensor, or one layer of a stacked one, into its Hugging Face tensors."""
    names, config = [entry.full_name(name, layer) for name in entry.hugging_face], entry.of
    if entry.vocabulary:
        parts = [tensor[: config.vocab_size]]
    elif len(names) == 3:  # q, k, v
        by_group = tensor.unflatten(0, (config.num_key_value_heads, -1, config.head_dim))
        q, k, v = by_group.split([by_group.shape[1] - 2, 1, 1], dim=1)
        parts = [part.flatten(0, 2) for part in (q, k, v)]
    else:
        parts = list(tensor.chunk(len(names)))
    yield from zip(names, parts, strict=True)


def _join(parts: list[Tensor], config: LadderConfig) -> Tensor:
    """The reverse of `_split`. It does not pad the vocabulary."""
    if len(parts) == 3:  # q, k, v
        groups = (config.num_key_value_heads, -1, config.head_dim)
        return torch.cat([part.unflatten(0, groups) for part in parts], dim=1).flatten(0, 2)
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _check(tensors: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]], side: str) -> None:
    missing = [name for name in expected if name not in tensors]
    unknown = sorted(tensors.keys() - expected.keys())
    wrong = [
        f"{name} is {list(tensors[name].shape)}, not {list(shape)}"
        for name, shape in expected.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    problems = []
    if missing:
        problems.append("missing " + _some(missing))
    if unknown:
        problems.append("not in this model " + _some(unknown))
    if wrong:
        problems.append("misshaped " + _some(wrong))
    if problems:
        raise ValueError(
            f"the {side} tensors do not fit the model's configuration: {'; '.join(problems)}"
        )


def _some(names: list[str]) -> str:
    rest = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + rest
