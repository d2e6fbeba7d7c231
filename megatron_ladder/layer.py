"""The transformer layer of every residual kind, for megatron-core's TransformerBlock.

Between layers go two tensors, both [s, b, h] (arXiv 2501.06589, section 3):

    context        a, the state after the layer's attention, complete
    hidden_states  y, the layer's MLP output, its all-reduce possibly still in flight

so that the state after the MLP is m = a + y. megatron-core passes `context` from layer to layer for
cross-attention, which these decoders have not. The first layer of a model gets the embedding alone
(a = m = x), the last returns m alone.

    ladder     a' = m + attn(norm1(a))    m' = a' + mlp(norm2(m))
    standard   a' = m + attn(norm1(m))    m' = a' + mlp(norm2(a'))
    parallel   n = norm(m)                m' = m + (attn(n) + mlp(n))

A ladder sub-module reads the state before the previous sub-module's output arrived, so that output's
all-reduce runs behind it.
"""

from typing import Any

from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_ladder.collectives import reduce_gradient, start_all_reduce, wait
from megatron_ladder.config import Residual


class LadderTransformerLayer(TransformerLayer):
    """A layer built by a ModuleSpec whose linears do not communicate (linear.py).

    Args:
        residuals: the residual kind of each layer of the whole model; None: all are ladder layers.
        The others are TransformerLayer's.
    """

    def __init__(
        self, *args: Any, residuals: tuple[Residual, ...] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._refuse_unsupported()
        # megatron-core numbers the model's layers from 1, across pipeline stages.
        self.residual: Residual = residuals[self.layer_number - 1] if residuals else "ladder"
        self.is_last_layer = self.layer_number == self.config.num_layers

    def _refuse_unsupported(self) -> None:
        """Options of megatron-core's that this forward would silently ignore."""
        config = self.config
        modules = set(config.recompute_modules or ()) - {"core_attn"}
        unsupported = {
            "cross-attention": not isinstance(self.cross_attention, IdentityOp),
            "mixture of experts": self.is_moe_layer,
            "sequence_parallel": config.sequence_parallel,
            "pipeline_model_parallel_size > 1": config.pipeline_model_parallel_size > 1,
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
        """One layer on the pair of states above; see the module's docstring.

        Args:
            hidden_states: y, or the embedding when `context` is None. [s, b, h]
            context: a. [s, b, h]
            attention_kwargs: rotary_pos_emb and others, for self-attention.

        Returns:
            (y', a') for the next layer, or (m', None) after the last.
        """
        assert context_mask is None and padding_mask is None
        attention_kwargs.pop("dynamic_inference_decode_only", None)
        attention_kwargs["attention_mask"] = attention_mask
        y = None if context is None else hidden_states
        a = hidden_states if context is None else context

        if self.residual == "ladder":
            attention = self._attention(self.input_layernorm(a), **attention_kwargs)
            m = a if y is None else self._add(a, y)  # y arrived behind attention
            y = self._mlp(self.pre_mlp_layernorm(m))
            a = self._add(m, attention)  # attention's output arrived behind the MLP
        elif self.residual == "standard":
            m = a if y is None else self._add(a, y)
            a = self._add(m, self._attention(self.input_layernorm(m), **attention_kwargs))
            y = self._mlp(self.pre_mlp_layernorm(a))
        else:
            a = a if y is None else self._add(a, y)
            y = self._attention_and_mlp(self.input_layernorm(a), **attention_kwargs)

        return (self._add(a, y), None) if self.is_last_layer else (y, a)

    # The sub-modules take a normalised state and start the all-reduce of their output. Biases of
    # row-parallel linears, which would be added after it, are refused above.

    def _attention(self, x: Tensor, **kwargs: Any) -> Tensor:
        output, _ = self.self_attention(reduce_gradient(x, self.tp_group), **kwargs)
        return start_all_reduce(output, self.tp_group)

    def _mlp(self, x: Tensor) -> Tensor:
        output, _ = self.mlp(reduce_gradient(x, self.tp_group))
        return start_all_reduce(output, self.tp_group)

    def _attention_and_mlp(self, x: Tensor, **kwargs: Any) -> Tensor:
        x = reduce_gradient(x, self.tp_group)
        attention, _ = self.self_attention(x, **kwargs)
        mlp, _ = self.mlp(x)
        return start_all_reduce(attention + mlp, self.tp_group)

    def _add(self, residual: Tensor, output: Tensor) -> Tensor:
        """residual + dropout(output), once the output's all-reduce has arrived."""
        add = self.self_attn_bda(self.training, self.config.bias_dropout_fusion)
        return add((wait(output), None), residual, self.hidden_dropout)
