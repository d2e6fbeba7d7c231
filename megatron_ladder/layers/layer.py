"""The transformer layer of every residual kind, for megatron-core's TransformerBlock.

A layer passes two tensors to the next layer (arXiv 2501.06589, section 3). Both are [s, b, h], or
[s/tp, b, h] with sequence parallelism:

    context        a, the state without the last sub-module's output, complete
    hidden_states  y, that output, its collective possibly still in flight

The state with all outputs is m = a + y. megatron-core passes `context` from layer to layer for
cross-attention, which these decoders do not have. The first layer of a model gets the embedding alone
(a = m = x), and the last layer returns m alone. A pipeline stage sends both tensors to the next stage
complete, packed as one tensor (stages.py).

    ladder           a' = m + attn(norm1(a))    m' = a' + mlp(norm2(m))
    standard         a' = m + attn(norm1(m))    m' = a' + mlp(norm2(a'))
    parallel         n = norm(m)                m' = m + (attn(n) + mlp(n))
    parallel-ladder  n = norm(a)                m' = m + (attn(n) + mlp(n))
    desync           as standard, with collectives at every n-th sub-module only (desync.py)
    with residual scaling, each attn, mlp or (attn + mlp) is multiplied before it is added (norm.py)

A ladder sub-module reads the state without the output of the previous sub-module. So the collective of that
output can run while the ladder sub-module computes. In backward, the reduction of its input's gradient runs
during the backward of the previous sub-module. docs/design/overlap.md has the timeline.

Standard and parallel layers can hide their collectives too, in two halves of the micro-batch: while the
collective of one half's output runs, the other half computes (`halves`; Domino, arXiv 2409.15241). Then
`context` is a pair: m of the first half and a of the second half, whose y is in flight.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.fp8_utils import is_first_last_bf16_layer
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_ladder.collectives import streams
from megatron_ladder.collectives.points import (
    SubmoduleCollectives,
    collectives_of,
    input_start,
    input_wait,
    output_start,
    output_wait,
)
from megatron_ladder.collectives.ranges import named
from megatron_ladder.config import PARALLEL, STALE, AllReduce, Residual, ResidualScaling
from megatron_ladder.layers import desync
from megatron_ladder.layers.halves import Call, Submodule, calls_of, half_of, join, split
from megatron_ladder.layers.linear import first_linear
from megatron_ladder.layers.norm import residual_scales
from megatron_ladder.layers.recompute import numbers_drawn, recomputed
from megatron_ladder.layers.stages import pack, unpack

# The name of an attribute: the input of the next layer, in flight, on the state it was made from.
_PREPARED = "_prepared_input"


class LadderTransformerLayer(TransformerLayer):
    """A layer built by a ModuleSpec whose linears do not communicate (linear.py).

    Args:
        residuals: the residual kind of each layer of the whole model. None: all are ladder layers.
        residual_scaling: what each output is multiplied by before it is added (norm.py).
        desync_interval: the n of desync-n, for desync layers.
        recompute: compute each sub-module's activations again in backward (recompute.py).
        halves: standard and parallel layers run each sub-module on two halves of the micro-batch in turn.
        *args: arguments of megatron-core's TransformerLayer.
        **kwargs: arguments of megatron-core's TransformerLayer.

    Raises:
        ValueError: the configuration has an option of megatron-core that this layer does not support.
    """

    def __init__(
        self,
        *args: Any,
        residuals: tuple[Residual, ...] | None = None,
        residual_scaling: ResidualScaling = "none",
        desync_interval: int = 1,
        recompute: bool = False,
        halves: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._refuse_unsupported(is_megatron_lms=residuals is None)
        # megatron-core numbers the model's layers from 1, across pipeline stages.
        self.residual: Residual = residuals[self.layer_number - 1] if residuals else "ladder"
        self.halves = halves
        self.submodules: tuple[Submodule, ...] = (
            ("both",) if self.residual in PARALLEL else ("attention", "mlp")
        )
        self._calls = calls_of(self.submodules, halves)
        self.residual_scales = residual_scales(residual_scaling, len(self.submodules), self.config)
        self.is_last_layer = self.layer_number == self.config.num_layers
        self.recompute = recompute
        self.in_fp8 = bool(self.config.fp8) and not is_first_last_bf16_layer(
            self.config, self.layer_number - 1
        )
        # stages.connect sets these two. A tuple, because torch would register a layer as a submodule.
        self.next_layer: tuple[LadderTransformerLayer, ...] = ()
        self.is_last_of_stage: bool | None = None
        self.sends_pair = bool(STALE.intersection(residuals)) if residuals else True
        self.comm_group = None if self.residual == "no-comm" else self.tp_group
        self.all_reduce: AllReduce = "exact"  # inference.sums sets it
        # At most one item: the function to call in the middle of the running sub-module, and whether it
        # records gradients; see `_submodule`. A list, because to assign a module's attribute is slow.
        self._chain: list[tuple[Callable[[], None], bool]] = []
        both = "both" in self.submodules
        # The chain may start experts: of parallel kinds those of the next layer.
        self.chain_dispatches = self.is_moe_layer or (
            both and self.config.num_moe_experts is not None
        )
        if (self.config.sequence_parallel or self.is_moe_layer) and not both:
            self._hook_attention()
            first_linear(self.mlp).register_forward_hook(self._run_chain)
        self.desync_interval = desync_interval
        if self.residual == "desync":
            own = [p for name, p in self.named_parameters() if name.count(".") < 2]  # norms, scales
            desync.sum_gradients(own, self.tp_group)

    @property
    def hides(self) -> bool:
        """Whether a collective runs while the next sub-module, or the other half, computes."""
        return self.halves or self.residual in STALE  # adaptation changes the kind (gradual.py)

    def _refuse_unsupported(self, *, is_megatron_lms: bool) -> None:
        """Raises ValueError for options of megatron-core that this layer would ignore. The spec for
        Megatron-LM's script is made before the script has read its options."""
        config = self.config
        modules = set(config.recompute_modules or ()) - {"core_attn"}
        unsupported = {
            "cross-attention": not isinstance(self.cross_attention, IdentityOp),
            "mixture of experts": (is_megatron_lms and config.num_moe_experts is not None)
            or (self.is_moe_layer and type(self) is LadderTransformerLayer),
            "norms of queries and keys (qk_layernorm)": is_megatron_lms and config.qk_layernorm,
            f"normalization {config.normalization}": config.normalization != "RMSNorm",
            "biases (add_bias_linear)": config.add_bias_linear,
            f"recompute_modules {sorted(modules)}, other than core_attn,": (
                config.recompute_granularity == "selective" and bool(modules)
            ),
        }
        if names := [name for name, used in unsupported.items() if used]:
            raise ValueError(f"this project's layers do not support {', '.join(names)} yet")

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        context: Tensor | tuple[Tensor, ...] | None = None,
        context_mask: Tensor | None = None,
        padding_mask: Tensor | None = None,
        **attention_kwargs: Any,
    ) -> tuple[Tensor, Tensor | tuple[Tensor, ...] | None]:
        """Runs one layer on the pair (a, y) of the module's docstring.

        With sequence parallelism all shapes have s/tp instead of s.

        Args:
            hidden_states: y, [s, b, h]; of halves the second one's, [s, b/2, h]. When `context` is None:
                the embedding, [s, b, h], or the tensor that the previous pipeline stage sent, [s, b, h] or
                packed [s, b, 2h].
            context: a, [s, b, h]; of halves both, [s, b/2, h] each; or None.
            attention_mask: for self-attention.
            context_mask: must be None.
            padding_mask: must be None.
            **attention_kwargs: rotary_pos_emb and others, for self-attention.

        Returns:
            (y', a') for the next layer. The last layer of a pipeline stage returns one tensor and None.
            The tensor is m' after the model's last layer, else the tensor for the next stage.

        Raises:
            ValueError: with pipeline stages, when `build_gpt_model` did not build the layer.
        """
        assert context_mask is None and padding_mask is None
        if self.is_last_of_stage is None and self.config.pipeline_model_parallel_size > 1:
            raise ValueError(
                "pipeline stages of ladder layers are built by "
                "megatron_ladder.mcore_compat.build_gpt_model, which connects them"
            )
        attention_kwargs.pop("dynamic_inference_decode_only", None)
        attention_kwargs["attention_mask"] = attention_mask
        y: Tensor | None
        if context is not None:
            states, y = (context if isinstance(context, tuple) else (context,)), hidden_states
        elif self.halves:
            states, y = split(hidden_states), None
        else:
            a, y = unpack(hidden_states, self.config.hidden_size)
            states = (a,)

        if self.residual == "desync":
            return desync.run(self, states[0], attention_kwargs), None
        run = self._hiding if self.hides else self._waiting
        y, states = run(states, y, attention_kwargs)
        *complete, a = states
        if self.is_last_layer or (self.is_last_of_stage and not self.sends_pair):
            return join((*complete, self._add(a, y))), None
        if self.is_last_of_stage:
            return pack(a, output_wait(y)), None
        return y, (tuple(states) if self.halves else a)

    def _hiding(
        self, states: tuple[Tensor, ...], y: Tensor | None, kwargs: dict[str, Any]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Runs each sub-module while the output of the one before it is on its way.

        Args:
            states: one state, or those of two halves of the micro-batch.
            y: the output in flight that belongs to the last of `states`.
            kwargs: for self-attention.

        Returns:
            The output of the last sub-module, in flight, and the states.
        """
        updated = list(states)
        if (x := getattr(states[0], _PREPARED, None)) is not None:
            # `x` was made from the state, so this is a reference cycle: break it.
            delattr(states[0], _PREPARED)
        else:
            behind = None if y is None else collectives_of(y)
            x = self._start_submodule(self.submodules[0], states[0], behind)
        of = len(states) - 1  # the state that `y` belongs to
        for (name, half), following in self._calls:
            state = updated[of]
            chain = partial(self._between, state, y, following, collectives_of(x))
            given = half_of(kwargs, half) if self.halves else kwargs
            y, (updated[of], x) = self._submodule(name, x, chain, (state, y), **given)
            of = half
        assert y is not None
        return y, tuple(updated)

    def _between(
        self,
        state: Tensor,
        y: Tensor | None,
        following: Call | None,
        behind: SubmoduleCollectives | None,
    ) -> tuple[Tensor, Tensor | None]:
        """The chain between the previous and the next sub-module; see `_submodule`.

        Args:
            state: the state that the previous sub-module's output belongs to.
            y: that output; None before the first one.
            following: the next sub-module in this layer; None: it is the next layer's.
            behind: the collectives of the sub-module that runs.
        """
        state = state if y is None else self._add(state, y)
        if following is None:
            return self._prepare_next(state), None
        return state, self._start_submodule(following[0], state, behind)

    def _waiting(
        self, states: tuple[Tensor, ...], y: Tensor | None, kwargs: dict[str, Any]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """As `_hiding`, but each sub-module runs when the output of the one before it has come."""
        (state,) = states
        for name in self.submodules:
            state = state if y is None else self._add(state, y)
            y, _ = self._submodule(name, self._start_submodule(name, state), **kwargs)
        assert y is not None
        return y, (state,)

    def _start_submodule(
        self, name: Submodule, x: Tensor, behind: SubmoduleCollectives | None = None
    ) -> Tensor:
        """Normalises a state, and starts to bring it to a sub-module; see `input_start`."""
        if name == "both":
            x = self.input_layernorm(x)
        elif name == "attention":
            x = self._normalised(x, self.input_layernorm, self.self_attention.linear_qkv)
        else:
            x = self._normalised(x, self.pre_mlp_layernorm, self.mlp.linear_fc1)
        return self._bring(x, behind, readers=2 if name == "both" else 1)

    def _bring(self, x: Tensor, behind: SubmoduleCollectives | None, readers: int) -> Tensor:
        """`input_start` of a normalised input, which so many linears read."""
        number = None if behind is None else behind.number
        sequence_parallel = self.config.sequence_parallel
        return input_start(x, self.comm_group, sequence_parallel, number, self.all_reduce, readers)

    def _normalised(self, x: Tensor, norm: Any, linear: Any) -> Tensor:
        """norm(x). For an FP8 `linear` it is in FP8, so that the all-gather is in FP8 too."""
        if not self.in_fp8:
            return norm(x)
        group = self.comm_group if self.config.sequence_parallel else None
        return linear.normalised(x, norm, group)

    def _submodule(
        self,
        name: Submodule,
        x: Tensor,
        chain: Callable[[], tuple[Tensor, Tensor | None]] | None = None,
        reads: tuple[Tensor | None, ...] = (),
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:
        """Runs a sub-module, and the chain between the previous and the next one.

        Args:
            name: attention, mlp, or both: the sum of the two.
            x: its input, from `_start_submodule`.
            chain: waits for the output of the previous sub-module, adds it, and starts the input of
                the next sub-module. Returns the new state, and that input or None.
            reads: the tensors that `chain` reads.
            **kwargs: for self-attention.

        Returns:
            The output of the sub-module, in flight, and what `chain` returned.
        """
        own = collectives_of(x)
        sequence_parallel = own is not None and own.sequence_parallel
        in_the_middle = chain is not None and (sequence_parallel or self.chain_dispatches)
        since = streams.moment() if in_the_middle else None
        x = input_wait(x)
        results: list[tuple[Tensor, Tensor | None]] = []

        def run() -> None:
            assert chain is not None
            with streams.beside(since, *reads):
                results.append(chain())

        # Without sequence parallelism the chain has one wait. It runs as late as possible, after the
        # sub-module. With sequence parallelism, or experts, the chain has two collectives, one after the
        # other. It runs in the middle of the sub-module, so that each collective overlaps with a part of
        # the sub-module: in forward, and in backward too, by the order in which the nodes are made.
        if in_the_middle:
            self._chain.append((run, torch.is_grad_enabled()))
        if name == "both":
            output = self._both(x, **kwargs)
        else:
            if own is not None and sequence_parallel and self.in_fp8:
                is_attention = name == "attention"
                last = self.self_attention.linear_proj if is_attention else self.mlp.linear_fc2
                own.gradient_in_fp8 = last.output_gradient
            output = self._compute(name, x, **(kwargs if name == "attention" else {}))
        output = output_start(output, own, self.residual_scales[self.submodules.index(name)])
        assert not self._chain, "the sub-module's first linear did not run"
        if chain is not None and not results:
            run()
        elif results and since is not None:
            streams.rejoin(*results[0])
        return output, results[0] if results else None

    def _both(self, x: Tensor, **kwargs: Any) -> Tensor:
        """Attention and MLP of one input, and the chain between them."""
        attention = self._compute("attention", x, **kwargs)
        self._run_chain()
        return attention + self._compute("mlp", x)

    def _hook_attention(self) -> None:
        """Makes the chain run in the middle of attention."""
        self.self_attention.linear_qkv.register_forward_hook(self._run_chain)

    def _run_chain(self, *_: Any) -> None:
        """Runs the chain of the running sub-module, in its middle: between attention and MLP, or as hook of
        a linear. In recomputation there is no chain to run."""
        if self._chain:
            chain, records = self._chain.pop()
            with torch.set_grad_enabled(records):  # gradients are off in recomputation's first pass
                chain()
            numbers_drawn()

    def _compute(self, name: Submodule, x: Tensor, **kwargs: Any) -> Tensor:
        """Runs attention or MLP: [s, b, h] -> [s, b, h] partial sums.

        There are no biases to add after the sum: `_refuse_unsupported` refuses them.
        """
        module = self.self_attention if name == "attention" else self.mlp

        def submodule(x: Tensor) -> Tensor:
            # Compiled layers share one graph, unless the code reads their number. Compiled code has no
            # ranges, so it does not need the number.
            number = None if torch.compiler.is_compiling() else self.layer_number
            with named(f"layer {number}: {name}"):
                output, _ = module(x, **kwargs)
            return output

        return recomputed(submodule, x) if self.recompute and self.training else submodule(x)

    def _prepare_next(self, a: Tensor) -> Tensor:
        """Starts the input of the next layer, if that is a collective.

        Here, in the middle of this layer's last sub-module, it overlaps with computation.
        """
        for following in self.next_layer:
            dispatches = following.is_moe_layer and "both" in following.submodules
            if following.hides and (self.config.sequence_parallel or dispatches):
                setattr(a, _PREPARED, following._start_submodule(following.submodules[0], a))
        return a

    def _add(self, residual: Tensor, output: Tensor) -> Tensor:
        """Waits for `output`, then returns residual + dropout(output)."""
        add = self.self_attn_bda(self.training, self.config.bias_dropout_fusion)
        return add((output_wait(output), None), residual, self.hidden_dropout)
