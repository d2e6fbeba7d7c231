"""The transformer layer of every residual kind, for megatron-core's TransformerBlock.

A layer passes two tensors to the next layer (arXiv 2501.06589, section 3). Both are [s, b, h], or
[s/tp, b, h] with sequence parallelism:

    context        a, the state after the layer's attention, complete
    hidden_states  y, the layer's MLP output, its collective possibly still in flight

The state after the MLP is m = a + y. megatron-core passes `context` from layer to layer for
cross-attention, which these decoders do not have. The first layer of a model gets the embedding alone
(a = m = x), and the last layer returns m alone. A pipeline stage sends both tensors to the next stage
complete, packed as one tensor (stages.py).

    ladder     a' = m + attn(norm1(a))    m' = a' + mlp(norm2(m))
    standard   a' = m + attn(norm1(m))    m' = a' + mlp(norm2(a'))
    parallel   n = norm(m)                m' = m + (attn(n) + mlp(n))
    desync     as standard, with collectives at every n-th sub-module only (desync.py)

A ladder sub-module reads the state without the output of the previous sub-module. So the collective of that
output can run while the ladder sub-module computes. In backward, the reduction of its input's gradient runs
during the backward of the previous sub-module. docs/design/overlap.md has the timeline.
"""

from collections.abc import Callable
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
from megatron_ladder.config import AllReduce, Residual
from megatron_ladder.layers.desync import meet, part_ways, sum_weight_gradients
from megatron_ladder.layers.recompute import numbers_drawn, recomputed
from megatron_ladder.layers.stages import pack, unpack

# The name of an attribute: the next layer's attention input, in flight, on the state it was made from.
_PREPARED = "_prepared_input"


class LadderTransformerLayer(TransformerLayer):
    """A layer built by a ModuleSpec whose linears do not communicate (linear.py).

    Args:
        residuals: the residual kind of each layer of the whole model. None: all are ladder layers.
        desync_interval: the n of desync-n, for desync layers.
        recompute: compute each sub-module's activations again in backward (recompute.py).
        *args: arguments of megatron-core's TransformerLayer.
        **kwargs: arguments of megatron-core's TransformerLayer.

    Raises:
        ValueError: the configuration has an option of megatron-core that this layer does not support.
    """

    def __init__(
        self,
        *args: Any,
        residuals: tuple[Residual, ...] | None = None,
        desync_interval: int = 1,
        recompute: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._refuse_unsupported()
        # megatron-core numbers the model's layers from 1, across pipeline stages.
        self.residual: Residual = residuals[self.layer_number - 1] if residuals else "ladder"
        self.is_last_layer = self.layer_number == self.config.num_layers
        self.recompute = recompute
        self.in_fp8 = bool(self.config.fp8) and not is_first_last_bf16_layer(
            self.config, self.layer_number - 1
        )
        # stages.connect sets these two. A tuple, because torch would register a layer as a submodule.
        self.next_layer: tuple[LadderTransformerLayer, ...] = ()
        self.is_last_of_stage: bool | None = None
        self.sends_pair = "ladder" in residuals if residuals else True
        self.comm_group = None if self.residual == "no-comm" else self.tp_group
        self.all_reduce: AllReduce = "exact"  # inference.sums sets it
        # At most one item: the function to call in the middle of the running sub-module, and whether it
        # records gradients; see `_submodule`. A list, because to assign a module's attribute is slow.
        self._chain: list[tuple[Callable[[], None], bool]] = []
        if self.config.sequence_parallel:
            for first_linear in (self.self_attention.linear_qkv, self.mlp.linear_fc1):
                first_linear.register_forward_hook(self._run_chain)
        self.desync_interval = desync_interval
        if self.residual == "desync":
            sum_weight_gradients((self.input_layernorm, self.pre_mlp_layernorm), self.tp_group)

    def _refuse_unsupported(self) -> None:
        """Raises ValueError for options of megatron-core that this layer's forward would ignore."""
        config = self.config
        modules = set(config.recompute_modules or ()) - {"core_attn"}
        unsupported = {
            "cross-attention": not isinstance(self.cross_attention, IdentityOp),
            "mixture of experts": self.is_moe_layer,
            # This layer's code does not prevent context parallelism. But megatron-core's local attention
            # refuses it, so it cannot be tested on the CPU, and we support only what we test.
            "context_parallel_size > 1": config.context_parallel_size > 1,
            "biases (add_bias_linear)": config.add_bias_linear,
            f"recompute_modules {sorted(modules)}, other than core_attn,": (
                config.recompute_granularity == "selective" and bool(modules)
            ),
        }
        if names := [name for name, used in unsupported.items() if used]:
            raise ValueError(f"ladder layers do not support {', '.join(names)} yet")

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        padding_mask: Tensor | None = None,
        **attention_kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Runs one layer on the pair (a, y) of the module's docstring.

        With sequence parallelism all shapes have s/tp instead of s.

        Args:
            hidden_states: y, [s, b, h]. When `context` is None: the embedding, [s, b, h], or the tensor
                that the previous pipeline stage sent, [s, b, h] or packed [s, b, 2h].
            context: a, [s, b, h], or None.
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
        if context is None:
            a, y = unpack(hidden_states, self.config.hidden_size)
        else:
            a, y = context, hidden_states

        if self.residual == "ladder":
            y, a = self._ladder(a, y, attention_kwargs)
        elif self.residual in ("standard", "no-comm"):
            y, a = self._standard(a, y, attention_kwargs)
        elif self.residual == "parallel":
            y, a = self._parallel(a, y, attention_kwargs)
        else:
            return self._desync(a, attention_kwargs), None

        if self.is_last_layer or (self.is_last_of_stage and not self.sends_pair):
            return self._add(a, y), None
        if self.is_last_of_stage:
            return pack(a, output_wait(y)), None
        return y, a

    def _ladder(self, a: Tensor, y: Tensor | None, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        previous = None if y is None else collectives_of(y)
        if (x := getattr(a, _PREPARED, None)) is not None:
            delattr(a, _PREPARED)  # `x` was made from `a`, so this is a reference cycle: break it
        else:
            x = self._start_attention(a, previous)
        attention_collectives = collectives_of(x)

        def after_previous_mlp() -> tuple[Tensor, Tensor]:
            m = a if y is None else self._add(a, y)
            return m, self._start_mlp(m, attention_collectives)

        def after_attention() -> tuple[Tensor, None]:
            return self._prepare_next(self._add(m, attention)), None

        attention, (m, x) = self._submodule(
            self.self_attention, x, after_previous_mlp, (a, y), **kwargs
        )
        y, (a, _) = self._submodule(self.mlp, x, after_attention, (m, attention))
        return y, a

    def _standard(
        self, a: Tensor, y: Tensor | None, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        m = a if y is None else self._add(a, y)
        attention, _ = self._submodule(self.self_attention, self._start_attention(m), **kwargs)
        a = self._add(m, attention)
        y, _ = self._submodule(self.mlp, self._start_mlp(a))
        return y, a

    def _parallel(
        self, a: Tensor, y: Tensor | None, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        m = a if y is None else self._add(a, y)
        x = self._start(self.input_layernorm(m))
        own = collectives_of(x)
        x = input_wait(x, shared=True)
        attention = self._compute(self.self_attention, x, **kwargs)
        return output_start(attention + self._compute(self.mlp, x), own), m

    def _desync(self, x: Tensor, kwargs: dict[str, Any]) -> Tensor:
        number = 2 * (self.layer_number - 1)  # the number of sub-modules before this one
        last = 2 * self.config.num_layers
        for norm, module, arguments in (
            (self.input_layernorm, self.self_attention, kwargs),
            (self.pre_mlp_layernorm, self.mlp, {}),
        ):
            if number % self.desync_interval == 0:
                x = part_ways(x, self.tp_group)
            number += 1
            output = self._compute(module, norm(x), **arguments)
            if number % self.desync_interval == 0 or number == last:
                x = meet(self._add(x / self.tp_group.size(), output), self.tp_group)
            else:
                x = self._add(x, output)
        return x

    def _start_attention(self, x: Tensor, behind: SubmoduleCollectives | None = None) -> Tensor:
        return self._start(
            self._normalised(x, self.input_layernorm, self.self_attention.linear_qkv), behind
        )

    def _start_mlp(self, x: Tensor, behind: SubmoduleCollectives | None = None) -> Tensor:
        return self._start(self._normalised(x, self.pre_mlp_layernorm, self.mlp.linear_fc1), behind)

    def _normalised(self, x: Tensor, norm: Any, linear: Any) -> Tensor:
        """norm(x). For an FP8 `linear` it is in FP8, so that the all-gather is in FP8 too."""
        if not self.in_fp8:
            return norm(x)
        group = self.comm_group if self.config.sequence_parallel else None
        return linear.normalised(x, norm, group)

    def _start(self, x: Tensor, behind: SubmoduleCollectives | None = None) -> Tensor:
        """Starts to bring a normalised state to a sub-module; see `input_start`."""
        number = None if behind is None else behind.number
        sequence_parallel, all_reduce = self.config.sequence_parallel, self.all_reduce
        return input_start(x, self.comm_group, sequence_parallel, number, all_reduce)

    def _submodule(
        self,
        module: Any,
        x: Tensor,
        chain: Callable[[], tuple[Tensor, Tensor | None]] | None = None,
        reads: tuple[Tensor | None, ...] = (),
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:
        """Runs attention or MLP, and the chain between the previous and the next sub-module.

        Args:
            module: attention or MLP.
            x: its input, from `_start`.
            chain: waits for the output of the previous sub-module, adds it, and starts the input of
                the next sub-module. Returns the new state, and that input or None.
            reads: the tensors that `chain` reads.

        Returns:
            The output of `module`, in flight, and what `chain` returned.
        """
        own = collectives_of(x)
        since = streams.moment() if own is not None and own.sequence_parallel else None
        x = input_wait(x)
        results: list[tuple[Tensor, Tensor | None]] = []

        def run() -> None:
            assert chain is not None
            with streams.beside(since, *reads):
                results.append(chain())

        # Without sequence parallelism the chain has one wait. It runs as late as possible, after the
        # sub-module. With sequence parallelism the chain has two collectives, one after the other. It runs
        # in the middle of the sub-module, so that each collective overlaps with a part of the sub-module:
        # in forward, and in backward too, because of the order in which the nodes are made.
        if chain is not None and own is not None and own.sequence_parallel:
            self._chain.append((run, torch.is_grad_enabled()))
        if own is not None and own.sequence_parallel and self.in_fp8:
            is_attention = module is self.self_attention
            last_linear = module.linear_proj if is_attention else module.linear_fc2
            own.gradient_in_fp8 = last_linear.output_gradient
        output = output_start(self._compute(module, x, **kwargs), own)
        assert not self._chain, "the sub-module's first linear did not run"
        if chain is not None and not results:
            run()
        elif results and since is not None:
            streams.rejoin(*results[0])
        return output, results[0] if results else None

    def _run_chain(self, *_: Any) -> None:
        """Forward hook of a sub-module's first linear. In recomputation there is no chain to run."""
        if self._chain:
            chain, records = self._chain.pop()
            with torch.set_grad_enabled(records):  # gradients are off in recomputation's first pass
                chain()
            numbers_drawn()

    def _compute(self, module: Any, x: Tensor, **kwargs: Any) -> Tensor:
        """Runs attention or MLP: [s, b, h] -> [s, b, h] partial sums.

        There are no biases to add after the sum: `_refuse_unsupported` refuses them.
        """

        def submodule(x: Tensor) -> Tensor:
            # Compiled layers share one graph, unless the code reads their number. Compiled code has no
            # ranges, so it does not need the number.
            number = None if torch.compiler.is_compiling() else self.layer_number
            with named(f"layer {number}: {name}"):
                output, _ = module(x, **kwargs)
            return output

        name = "attention" if module is self.self_attention else "mlp"

        return recomputed(submodule, x) if self.recompute and self.training else submodule(x)

    def _prepare_next(self, a: Tensor) -> Tensor:
        """With sequence parallelism, starts the attention input of the next layer.

        Here, in the middle of this layer's MLP, its all-gather overlaps with computation.
        """
        if not self.config.sequence_parallel or self.tp_group.size() == 1:
            return a
        for following in self.next_layer:
            if following.residual == "ladder":
                setattr(a, _PREPARED, following._start_attention(a))
        return a

    def _add(self, residual: Tensor, output: Tensor) -> Tensor:
        """Waits for `output`, then returns residual + dropout(output)."""
        add = self.self_attn_bda(self.training, self.config.bias_dropout_fusion)
        return add((output_wait(output), None), residual, self.hidden_dropout)
