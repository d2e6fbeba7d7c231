"""Converts names and layouts of weights between megatron-core's checkpoints and Hugging Face.

The names and shapes are in table.py.

A tensor may be an object that reads its data only when needed. It must have `shape`, `dtype`, and
`tensor[:]`, `tensor[layer]` or `tensor[layer, expert]`, which return a torch.Tensor.
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

from megatron_ladder.hf.modelling.configuration_ladder import LadderConfig
from megatron_ladder.hf.table import Entry, entries

# A sub-module's output is what its last linear gives.
_LAST_LINEARS = ("self_attn.o_proj.weight", ".down_proj.weight")
# Of a bf16 model it stays in fp32, as in training: its steps are smaller than bf16's.
_FP32 = ".e_score_correction_bias"


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
    table = entries(config)
    embedding = tensors.get("embedding.word_embeddings.weight")
    padded_vocab_size = config.vocab_size if embedding is None else embedding.shape[0]
    if padded_vocab_size < config.vocab_size:
        raise ValueError(
            f"embedding.word_embeddings.weight has {padded_vocab_size} rows, fewer than the "
            f"vocabulary's {config.vocab_size}"
        )
    expected = {e.megatron: e.megatron_shape(padded_vocab_size) for e in table}
    _check(tensors, expected, "megatron-core")

    def stream() -> Iterator[tuple[str, Tensor]]:
        for of_layers, group in itertools.groupby(table, key=lambda entry: entry.layers):
            places = [(place, entry) for entry in group for place in entry.places]
            if of_layers:  # a layer after the other
                places.sort(key=lambda found: found[0][0])
            for place, entry in places:
                yield from _split(entry, tensors[entry.megatron][place or slice(None)], place)

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
    """A whole megatron-core tensor; or one layer, or one expert of one layer, of a stacked one."""

    name: str
    shape: tuple[int, ...]
    """The shape of the whole tensor, with the axes of layers and experts."""
    dtype: torch.dtype
    place: tuple[int, ...]
    """The indices on its first axes: the layer's, the expert's, from 0. (): the tensor is not stacked."""
    make: Callable[[], Tensor]
    """Reads the Hugging Face tensors and joins them. The result is without the axes of `place`."""

    @property
    def index(self) -> Any:
        """What the whole tensor is indexed with."""
        return self.place or slice(None)


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
        name: shape
        for entry in entries(config)
        for place in entry.places
        for name, shape in zip(entry.names(place), entry.hugging_face.values(), strict=True)
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
        One chunk for each layer, or each expert of a layer, of each stacked tensor, and one for each other
        tensor.

    Raises:
        ValueError: a tensor is missing, unknown or has another shape, tensors that are joined have
            different dtypes, or `padded_vocab_size` is less than the vocabulary.
    """
    if padded_vocab_size < config.vocab_size:
        raise ValueError(
            f"padded_vocab_size {padded_vocab_size} is less than vocab_size {config.vocab_size}"
        )
    state = checked_hf_tensors(state, config)

    def make(entry: Entry, place: tuple[int, ...]) -> Tensor:
        parts = [state[name][:] for name in entry.names(place)]
        tensor = _join(parts, entry)
        if entry.vocabulary and len(tensor) < padded_vocab_size:
            tensor = torch.nn.functional.pad(tensor, (0, 0, 0, padded_vocab_size - len(tensor)))
        return tensor

    chunks = []
    for entry in entries(config):
        dtypes = {state[name].dtype for place in entry.places for name in entry.names(place)}
        if len(dtypes) > 1:
            raise ValueError(
                f"{'|'.join(name.format('N', 'N') for name in entry.hugging_face)} have different dtypes: "
                f"{', '.join(sorted(map(str, dtypes)))}. A checkpoint holds them as one tensor: store "
                "them all in one dtype"
            )
        shape = entry.megatron_shape(padded_vocab_size)
        for place in entry.places:
            makes = functools.partial(make, entry, place)
            chunks.append(Chunk(entry.megatron, shape, next(iter(dtypes)), place, makes))
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
        name: torch.stack([c.make() for c in chunks]).view(chunks[0].shape)
        for name, chunks in parts.items()
    }


def written_dtype(name: str, stored: torch.dtype, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype in which a tensor is written, or computes, in a model of another dtype.

    Args:
        name: Hugging Face's.
        dtype: the model's. None: each tensor keeps its own.
    """
    return stored if dtype is None or name.endswith(_FP32) else dtype


def main_dtype(tensors: Mapping[str, Any]) -> torch.dtype:
    """The dtype of most of the elements. Norms, for example, may have another one."""
    elements: dict[torch.dtype, int] = {}
    for tensor in tensors.values():
        elements[tensor.dtype] = elements.get(tensor.dtype, 0) + math.prod(tensor.shape)
    return max(elements, key=elements.__getitem__)


def _split(entry: Entry, tensor: Tensor, place: tuple[int, ...]) -> Iterator[tuple[str, Tensor]]:
    """Splits a megatron-core tensor, or a part of a stacked one, into its Hugging Face tensors."""
    names, config = entry.names(place), entry.of
    if entry.vocabulary:
        parts = [tensor[: config.vocab_size]]
    elif len(names) == 3:  # q, k, v
        by_group = tensor.unflatten(0, (config.num_key_value_heads, -1, config.head_dim))
        q, k, v = by_group.split([by_group.shape[1] - 2, 1, 1], dim=1)
        parts = [part.flatten(0, 2) for part in (q, k, v)]
    else:
        parts = list(tensor.chunk(len(names)))
    yield from zip(names, parts, strict=True)


def _join(parts: list[Tensor], entry: Entry) -> Tensor:
    """The reverse of `_split`. It does not pad the vocabulary."""
    if len(parts) == 3:  # q, k, v
        groups = (entry.of.num_key_value_heads, -1, entry.of.head_dim)
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
