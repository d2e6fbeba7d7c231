"""A sub-module's linears in FP8, with Transformer Engine's GEMMs and state and this project's collectives.

Transformer Engine's own autograd function could be used with its communication turned off. But under
sequence parallelism it would keep the gathered input for backward, tp times the size of the shard. It would
pass on the input's gradient only after it has computed the weight's (linear.py avoids the same in bf16).
And the input would have to be gathered in bf16 and quantised afterwards.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformer_engine.pytorch.cpp_extensions import general_gemm
from transformer_engine.pytorch.distributed import is_fp8_activation_recompute_enabled
from transformer_engine.pytorch.module._common import (
    can_reconstruct_wgrad_input_from_original,
    set_quantizer_amax_reduction_group,
)
from transformer_engine.pytorch.module.base import (
    _2X_ACC_DGRAD,
    _2X_ACC_FPROP,
    _2X_ACC_WGRAD,
    get_dummy_wgrad,
    quantize_weight,
)
from transformer_engine.pytorch.quantization import FP8GlobalStateManager as manager
from transformer_engine.pytorch.quantized_tensor import (
    QuantizedTensor,
    prepare_for_saving,
    restore_from_func_ctx,
)

from megatron_ladder.collectives.placeholder import fp8_of
from megatron_ladder.collectives.points import collectives_of
from megatron_ladder.te.layers.norm import quantised_norm
from megatron_ladder.te.layers.quantised import quantised, set_usage


def normalised(linear: Any, x: Tensor, norm: Any, gathered_by: dist.ProcessGroup | None) -> Tensor:
    """Computes norm(x) in FP8, as the input of an FP8 `linear`.

    Args:
        linear: Transformer Engine's, with its communication turned off, inside an autocast to FP8.
        x: [s, b, h], or [s/tp, b, h] with sequence parallelism.
        norm: a module with RMSNorm's weight.
        gathered_by: the process group that will gather it. None: it is not gathered.

    Returns:
        A placeholder of `x`'s shape.
    """
    linear.init_fp8_metadata(num_gemms=1)
    quantizer = linear._get_quantizers(False, False, False)[0]
    # Where a tensor has one scale, the parts of all ranks that are gathered get the same scale.
    set_quantizer_amax_reduction_group(quantizer, gathered_by)
    columns = torch.is_grad_enabled() and linear.weight.requires_grad
    set_usage(quantizer, columns=columns, gathered=gathered_by is not None)
    return quantised_norm(x, norm, quantizer)


def output_gradient(linear: Any, grad: Tensor, gathered_by: dist.ProcessGroup) -> Tensor:
    """Quantises a rank's part of the gradient of `linear`'s output to FP8, before the ranks gather it.

    Args:
        linear: the sub-module's last linear.
        grad: [s/tp, b, h].
        gathered_by: the process group that will gather it.

    Returns:
        A placeholder of `grad`'s shape.
    """
    quantizer = linear._get_quantizers(False, False, True)[5]
    set_quantizer_amax_reduction_group(quantizer, gathered_by)
    set_usage(quantizer, columns=linear.weight.requires_grad, gathered=True)
    return quantised(grad, quantizer)


def fp8_linear(linear: Any, x: Tensor) -> Tensor:
    """Runs `linear` in FP8. `x`, and in backward the output's gradient, may be placeholders of FP8 tensors.

    Backward starts the sum of the input's gradient over the ranks before it computes the weight's gradient.

    Args:
        linear: Transformer Engine's, with its communication turned off, inside an autocast to FP8.
        x: [s, b, input].

    Returns:
        [s, b, output], with the bias added.
    """
    linear.prepare_forward(x, allow_non_contiguous=True)
    try:
        output = _Linear.apply(x, linear.weight, _Call(linear, x))
    finally:
        linear.end_forward()
    linear.is_first_microbatch = False
    return output + linear.bias if linear.use_bias else output


class _Call:
    """The state of one call of a linear, besides tensors, that its forward and backward share."""

    def __init__(self, linear: Any, x: Tensor) -> None:
        self.linear, self.collectives = linear, collectives_of(x)
        self.records = torch.is_grad_enabled()
        self.input, weight, _, _, _, self.gradient = linear._get_quantizers(
            False, False, self.records
        )
        self.weight = getattr(linear.weight, "_quantizer", weight)
        caches = not linear.disable_parameter_transpose_cache
        self.is_first_microbatch = linear.is_first_microbatch if caches else None
        recipe = manager.get_fp8_recipe()
        self.precise = {"fprop": _2X_ACC_FPROP, "dgrad": _2X_ACC_DGRAD, "wgrad": _2X_ACC_WGRAD}
        for name in self.precise:  # the recipe for delayed scaling does not have these fields
            if (gemm := getattr(recipe, f"fp8_gemm_{name}", None)) is not None:
                self.precise[name] = gemm.use_split_accumulator

    def in_fp8(self, x: Tensor, quantizer: Any, *, rows: bool = True, columns: bool = True) -> Any:
        """Transformer Engine's FP8 tensor: the one that `x` is a placeholder of, or `x` quantised."""
        fp8: Any = fp8_of(x)
        if fp8 is not None:
            return fp8.tensor
        # `x` is whole here and is not gathered any more.
        set_quantizer_amax_reduction_group(quantizer, None)
        set_usage(quantizer, rows=rows, columns=columns)
        return quantizer(x.reshape(-1, x.size(-1)).contiguous())

    def quantised_weight(self) -> Any:
        """The weight in FP8. It is quantised once for all micro-batches of a step, where TE caches it."""
        linear, weight = self.linear, self.linear.weight
        if not isinstance(weight, QuantizedTensor):
            # The first forward of a recomputed sub-module records nothing, but backward needs both layouts.
            both = self.records or is_fp8_activation_recompute_enabled()
            self.weight.set_usage(rowwise=True, columnwise=both)
        cached = self.is_first_microbatch is not None
        weight, made = quantize_weight(
            tensor=weight,
            quantizer=self.weight,
            workspace=linear._fp8_workspaces.get("weight") if cached else None,
            update_workspace=self.is_first_microbatch is not False,
            workspace_dtype=linear.activation_dtype,
            cache=cached,
        )
        if made is not None:
            linear._fp8_workspaces["weight"] = made.detach()
        weight.update_usage(rowwise_usage=True)
        return weight

    def gemm(self, name: str, a: Any, b: Any, **kwargs: Any) -> Tensor:
        kwargs = {"out_dtype": self.linear.activation_dtype, **kwargs}
        return general_gemm(a, b, use_split_accumulator=self.precise[name], **kwargs)[0]


class _Linear(torch.autograd.Function):
    """x [s, b, i] times weight^T [i, o]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, call: _Call) -> Tensor:
        wgrad = call.records and ctx.needs_input_grad[1]
        # Attention keeps its output in bf16 for its own backward. So this linear does not keep a copy in
        # FP8: its backward quantises the bf16 tensor again.
        original = (
            call.linear.save_original_input
            and fp8_of(x) is None
            and can_reconstruct_wgrad_input_from_original(call.input)
        )
        fp8 = call.in_fp8(x, call.input, columns=wgrad and not original)
        quantised_weight = call.quantised_weight()
        output = call.gemm("fprop", quantised_weight, fp8)
        ctx.call, ctx.shape = call, x.shape
        # In a pass that records nothing this is not called: recomputation calls it with `for_forward`.
        ctx.gathers = (
            wgrad and call.collectives is not None and call.collectives.gather_input_again()
        )
        kept = None
        if wgrad and not ctx.gathers:
            kept = x if original else fp8
            if not original:
                fp8.update_usage(rowwise_usage=False, columnwise_usage=True)
        tensors, ctx.tensor_objects = prepare_for_saving(kept, quantised_weight)
        ctx.save_for_backward(*tensors)
        return output.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        call, collectives = ctx.call, ctx.call.collectives
        wgrad = ctx.needs_input_grad[1]
        x, weight = restore_from_func_ctx(ctx)
        grad = call.in_fp8(grads[0], call.gradient, columns=wgrad)
        weight.update_usage(columnwise_usage=True)
        dgrad: Tensor | None = call.gemm("dgrad", weight, grad, layout="NN", grad=True)
        assert dgrad is not None
        dgrad = dgrad.view(ctx.shape)
        if collectives is not None:
            collectives.start_input_gradient(dgrad)
            dgrad = None
        if not wgrad:
            return dgrad, None, None
        if ctx.gathers:
            # This is bf16 when the previous layer, which started the first all-gather, is in bf16.
            x = collectives.wait_input_again()
        if type(x) is Tensor:
            x = call.in_fp8(x, call.input, rows=False)
        # The rows of both have been read, or the kernel had to write them although nothing reads them.
        for operand in (x, grad):
            operand.update_usage(rowwise_usage=False, columnwise_usage=True)
        return dgrad, _weight_gradient(call, x, grad), None


def _weight_gradient(call: _Call, x: Any, grad: Any) -> Tensor:
    """grad^T x. The GEMM itself adds it to DDP's gradient buffer, where there is one.

    A step's first GEMM overwrites the buffer. Which one that is, DDP's flag says and not the number of the
    micro-batch: a micro-batch in halves has two for each weight.
    """
    weight = call.linear.weight
    if not call.linear.fuse_wgrad_accumulation or not hasattr(weight, "main_grad"):
        return call.gemm("wgrad", x, grad, layout="NT", grad=True)
    call.gemm(
        *("wgrad", x, grad),
        layout="NT",
        grad=True,
        out=weight.main_grad,
        out_dtype=weight.main_grad.dtype,
        accumulate=getattr(weight, "grad_added_to_main_grad", True),
    )
    weight.grad_added_to_main_grad = True  # so DDP adds nothing
    return get_dummy_wgrad(list(weight.shape), weight.dtype)
