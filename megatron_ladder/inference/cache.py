"""The key-value cache: what it takes, and how many tokens this machine's memory has room for.

The memory is asked of the device: a GPU's own; on a CPU the machine's, or what a control group leaves of
it, divided among the machine's ranks. All ranks of a model get the same cache, which fits the rank with the
least room.
"""

import bisect
import math
import socket
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_ladder.config import ModelConfig
from megatron_ladder.errors import UserError
from megatron_ladder.fields.experts import ExpertsConfig
from megatron_ladder.free_memory import memory_here

BLOCK_TOKENS = 16
"""Tokens in a block of the dynamic engine's cache."""
SPARE = 0.1
"""The part of the free memory that is left for what is not foreseen."""
_MORE = "On more GPUs each rank's part is smaller (--tensor-model-parallel-size)"


def in_blocks(tokens: int) -> int:
    """The tokens that the blocks hold which so many tokens of one request take."""
    return math.ceil(tokens / BLOCK_TOKENS) * BLOCK_TOKENS


@dataclass(frozen=True)
class Cache:
    """The size of the dynamic engine's cache, the same on all ranks."""

    blocks: int
    token_bytes: int
    """Of a token's keys and values, on this rank."""
    context: int
    """The most tokens of a request that the model allows."""
    is_cut: bool
    """Requests could use more, but the memory has no room for it."""

    @property
    def tokens(self) -> int:
        """All that it holds."""
        return self.blocks * BLOCK_TOKENS

    @property
    def longest(self) -> int:
        """The most tokens of a request: of its prompt, and of what is to follow."""
        return min(self.context, self.tokens)

    def __str__(self) -> str:
        size = in_bytes(self.tokens * self.token_bytes)
        why = ", as much as the memory has room for" if self.is_cut else ""
        return f"The key-value cache holds {self.tokens:,} tokens: {size} on each rank{why}."


def plan_cache(
    chunk: Any,
    model: ModelConfig,
    *,
    step_tokens: int,
    requests: int,
    useful_tokens: int,
    cache_tokens: int | None,
) -> Cache:
    """The dynamic engine's cache. Every rank of the model calls it, when the model is loaded.

    Args:
        chunk: this rank's part of the model, from build_gpt_model.
        model: its configuration, with vocab_size set.
        step_tokens: the most tokens of a forward pass.
        requests: the most requests that run at once.
        useful_tokens: the most tokens that they can use.
        cache_tokens: what the user asks for. None: useful_tokens, or fewer if the memory is too small.

    Raises:
        UserError: the memory has no room for cache_tokens, or for any cache; cache_tokens are less than a
            block.
    """
    part, context = Part.of_rank(chunk, model), model.max_position_embeddings
    blocks = math.ceil(useful_tokens / BLOCK_TOKENS)
    if cache_tokens is not None:
        blocks = cache_tokens // BLOCK_TOKENS
        if blocks < 1:
            raise UserError(
                f"a cache of {cache_tokens} tokens is smaller than one block of {BLOCK_TOKENS}"
            )

    def needed(blocks: int) -> int:
        tokens = (blocks + 1) * BLOCK_TOKENS  # the engine keeps a block for padding
        copies = part.copy_bytes(step_tokens, requests, min(context, tokens))
        return tokens * part.token_bytes + part.pass_bytes(step_tokens, requests) + copies

    free = usable_memory(part.device)
    fitting = bisect.bisect_right(range(blocks + 1), free, key=needed) - 1
    fitting = least_of_ranks(fitting, part.device)
    if fitting < 1:
        raise UserError(
            f"the memory has no room for a key-value cache: the smallest takes {in_bytes(needed(1))} with "
            f"what a step computes, and a rank may use {in_bytes(free)}. {_MORE}"
        )
    if cache_tokens is not None and fitting < blocks:
        raise UserError(
            f"--cache-tokens {cache_tokens} would take {in_bytes(needed(blocks))} with what a step "
            f"computes. A rank may use {in_bytes(free)}, and has room for {fitting * BLOCK_TOKENS} tokens: "
            f"leave the option out, or give less. {_MORE}"
        )
    return Cache(min(fitting, blocks), part.token_bytes, context, is_cut=fitting < blocks)


def check_batch(
    part: "Part", *, prompts: int, longest_prompt: int, longest: int, instead: str
) -> str:
    """What the cache of a batch takes, in a sentence, where all prompts run at once. Every rank calls it.

    Args:
        prompts: of the batch.
        longest_prompt: tokens of the longest; the others are padded.
        longest: the most tokens of a prompt with what is to follow.
        instead: what to do if the memory is too small.

    Raises:
        UserError: it does not fit the memory.
    """
    cache = prompts * longest * part.token_bytes
    needed = cache + part.pass_bytes(prompts * longest_prompt, prompts)
    free = usable_memory(part.device)
    if not least_of_ranks(int(needed <= free), part.device):
        raise UserError(
            f"a batch of {prompts} prompts of up to {longest} tokens, new ones included, takes "
            f"{in_bytes(needed)} beside the weights, and {in_bytes(free)} of memory may be used: {instead}"
        )
    return f"The key-value cache of {prompts} x {longest:,} tokens takes {in_bytes(cache)} on each rank."


@dataclass(frozen=True)
class Part:
    """What a rank's part of a model takes beside its weights."""

    token_bytes: int
    """Keys and values of one token, in all of the rank's layers."""
    layers: int
    width: int
    """Numbers of a token in a layer at a time: states, queries, keys, values, the MLP's."""
    itemsize: int
    """Bytes of a number."""
    vocab_size: int
    """Rows of the logits."""
    device: torch.device

    @classmethod
    def of_rank(cls, chunk: Any, model: ModelConfig) -> "Part":
        """Of a model from build_gpt_model."""
        config = chunk.decoder.config
        tp = config.tensor_model_parallel_size
        return cls.of(
            layers=len(chunk.decoder.layers),
            hidden=model.hidden_size,
            heads=model.num_attention_heads // tp,
            kv_heads=model.kv_heads // tp,
            head_dim=model.head_dim,
            ffn=widest(model.hidden_size, model.ffn_hidden_size, model.experts, tp),
            vocab_size=model.padded_vocab_size,
            dtype=config.params_dtype,
            device=next(chunk.parameters()).device,
        )

    @classmethod
    def of(
        cls,
        *,
        layers: int,
        hidden: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        ffn: int,
        vocab_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> "Part":
        """Of the sizes that a rank has."""
        states = 6 * hidden  # two states, sums that are under way, a norm's output
        attention = (3 * heads + 4 * kv_heads) * head_dim  # before and after RoPE, the output
        return cls(
            token_bytes=dtype.itemsize * 2 * layers * kv_heads * head_dim,
            layers=layers,
            width=states + attention + 4 * ffn,
            itemsize=dtype.itemsize,
            vocab_size=vocab_size,
            device=device,
        )

    def pass_bytes(self, tokens: int, requests: int) -> int:
        """What a forward pass computes: an estimate, rather too high than too low.

        Args:
            tokens: of the pass.
            requests: whose next token's logits it computes; sampling copies them.
        """
        return self.itemsize * tokens * self.width + 4 * 4 * requests * self.vocab_size

    def copy_bytes(self, tokens: int, requests: int, longest: int) -> int:
        """What attention.py copies out of the dynamic engine's cache, and its masks. 0 on a GPU, where
        flash-attn reads the cache itself.

        Args:
            tokens: of the pass; they may all be of one prompt.
            requests: that run.
            longest: the most tokens of a request.
        """
        if self.device.type == "cuda":
            return 0
        keys_and_values = 2 * longest * self.token_bytes // self.layers
        return max(requests * keys_and_values, keys_and_values + 5 * tokens * longest)


def widest(hidden: int, ffn: int, experts: ExpertsConfig, tp: int = 1) -> int:
    """The width of a rank's MLP, or of one that takes as much for a token as a layer's experts do.

    The experts of a rank may get all tokens: a copy of the token and an output for each choice. Besides
    there are the scores of all experts.
    """
    if experts.num_moe_experts is None:
        return ffn // tp
    routed = experts.moe_router_topk * (experts.expert_size(ffn) + hidden // 2)
    shared = (experts.moe_shared_expert_intermediate_size or 0) // tp
    return max(ffn // tp, routed + shared + experts.num_moe_experts)


def usable_memory(device: torch.device) -> int:
    """Bytes that this rank may take of the memory that is free. Every rank calls it."""
    mine = socket.gethostname()
    hosts = [mine]
    if dist.is_initialized():  # generation by transformers has one process
        hosts *= dist.get_world_size()
        dist.all_gather_object(hosts, mine)  # no rank goes on before all have loaded their part
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    else:
        free = memory_here() // hosts.count(mine)
    return int((1 - SPARE) * free)


def least_of_ranks(value: int, device: torch.device) -> int:
    """The least of the ranks' values. No rank goes on before all have called it."""
    least = torch.tensor(value, device=device)
    if dist.is_initialized():
        dist.all_reduce(least, op=dist.ReduceOp.MIN)
    return int(least)


def in_bytes(count: int) -> str:
    """ "2.25 GB", "1.5 MB", "12 kB": units of 1000."""
    if count >= 1e9:
        return f"{count / 1e9:.2f} GB"
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"
