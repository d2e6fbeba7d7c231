"""Layer specs: the modules from which megatron-core builds a model's layers.

`layer_spec` chooses between megatron-core's own (local) modules, which run on any machine, and Transformer
Engine's, which need a GPU. No other function makes this choice.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, Literal

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_with_transformer_engine_spec,
    get_mlp_module_spec_for_backend,
)
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from megatron_ladder.config import PARALLEL, Residual, ResidualScaling, TransformerImpl
from megatron_ladder.errors import UserError
from megatron_ladder.inference.attention import LocalSelfAttention
from megatron_ladder.inference.experts import DividedExpertsLayer
from megatron_ladder.layers.attention.core import TorchAttention, UnfusedAttention
from megatron_ladder.layers.experts_layer import LadderExpertsLayer
from megatron_ladder.layers.layer import LadderTransformerLayer
from megatron_ladder.layers.linear import (
    CommFreeColumnParallelLinear,
    CommFreeRowParallelLinear,
    LocalRowParallelLinear,
)
from megatron_ladder.layers.norm import RMSNorm

# Core attentions that can replace the default one, in local layers and in Transformer Engine's.
CORE_ATTENTION = {"torch": TorchAttention, "unfused": UnfusedAttention}


class LocalBackend(LocalSpecProvider):
    """megatron-core's local modules, with three replaced.

    The norm allows sequence parallelism, attention is torch's, and torch.compile can trace the row-parallel
    linear.
    """

    def layer_norm(self, *_: Any, **__: Any) -> type:
        return RMSNorm

    def core_attention(self) -> type:
        return TorchAttention

    def row_parallel_linear(self) -> type:
        return LocalRowParallelLinear


class LocalCommFreeBackend(LocalBackend):
    """`LocalBackend` with linears that do not communicate: the layer does it."""

    def column_parallel_linear(self) -> type:
        return CommFreeColumnParallelLinear

    def row_parallel_linear(self) -> type:
        return CommFreeRowParallelLinear


def comm_free_backend(te: bool) -> Any:
    """The modules of this project's layers: Transformer Engine's or local ones, without communication."""
    if not te:
        return LocalCommFreeBackend()
    from megatron_ladder.te.layers.backend import TECommFreeBackend

    return TECommFreeBackend()


def resolve_impl(impl: TransformerImpl) -> Literal["local", "transformer_engine"]:
    """Replaces "auto" by the implementation that this machine can run.

    "auto" becomes "transformer_engine" where Transformer Engine and a GPU are present, else "local"
    (megatron-core's own modules).

    Raises:
        UserError: `impl` is "transformer_engine", and the package or a GPU is missing.
    """
    have_te = find_spec("transformer_engine") is not None
    have_gpu = torch.cuda.is_available()
    if impl == "auto":
        return "transformer_engine" if have_te and have_gpu else "local"
    if impl == "transformer_engine" and not (have_te and have_gpu):
        missing = "a GPU" if have_te else "the transformer-engine package"
        raise UserError(
            f"transformer_impl=transformer_engine needs {missing}: use transformer_impl=local, or "
            "see `megatron-ladder doctor`"
        )
    return impl


def layer_spec(
    residuals: tuple[Residual, ...] | None,
    impl: TransformerImpl = "auto",
    experts: Any = None,
    *,
    divided: bool = False,
    residual_scaling: ResidualScaling = "none",
    layer_norms: bool = True,
    desync_interval: int = 1,
    recompute: bool = False,
    halves: bool = False,
    documents_apart: bool = False,
    qk_layernorm: bool = False,
    core_attention: Literal["te", "torch", "unfused"] | None = None,
) -> ModuleSpec:
    """The spec of a model's layers.

    A model with standard residuals alone uses megatron-core's own TransformerLayer, unless its outputs are
    scaled, it has no norms or it runs in halves: it is the baseline for comparisons.

    Args:
        residuals: each layer's residual kind, first to last. None: every layer is a ladder layer.
        impl: the implementation of the modules; see `resolve_impl`.
        experts: the spec of a mixture of experts in place of the MLP.
        divided: the experts are `DividedExperts`, for an inference engine.
        residual_scaling: what each output is multiplied by before it is added.
        layer_norms: attention and MLP read the state through norms.
        desync_interval: the number of sub-modules from one all-reduce to the next, in desync layers.
        recompute: full recomputation, one sub-module at a time. megatron-core's own layers ignore it: they
            have megatron-core's recomputation.
        halves: run each sub-module on two halves of the micro-batch in turn.
        documents_apart: forward gets the documents of each micro-batch, as packed_seq_params.
        qk_layernorm: add a norm of each head's query and key.
        core_attention: "te" (Transformer Engine's), "torch" or "unfused" (megatron-core's own). None:
            torch's in local layers, Transformer Engine's in its layers.

    Returns:
        One spec for all layers that have experts, or that have none. Each layer finds its residual kind by
        its layer number.

    Raises:
        UserError: from `resolve_impl`.
    """
    chosen = resolve_impl(impl)
    kinds = set(residuals or ("ladder",))
    assert experts is None or not halves
    assert kinds <= PARALLEL or not kinds & PARALLEL
    theirs = kinds == {"standard"} and residual_scaling == "none" and layer_norms and not halves
    if theirs and chosen == "transformer_engine":
        spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=qk_layernorm)
        if experts is not None:
            from megatron.core.extensions.transformer_engine import TENorm

            spec.submodules.mlp = experts
            spec.submodules.pre_mlp_layernorm = TENorm
            spec.submodules.sharded_state_dict_keys_map = {}
    elif theirs:
        submodules = _submodules(LocalBackend(), kinds, qk_layernorm, experts=experts)
        spec = ModuleSpec(module=TransformerLayer, submodules=submodules)
    else:
        with_experts = DividedExpertsLayer if divided else LadderExpertsLayer
        backend = comm_free_backend(chosen == "transformer_engine")
        spec = ModuleSpec(
            module=LadderTransformerLayer if experts is None else with_experts,
            submodules=_submodules(backend, kinds, qk_layernorm, layer_norms, experts),
            params={
                "residuals": residuals,
                "residual_scaling": residual_scaling,
                "desync_interval": desync_interval,
                "recompute": recompute,
                "halves": halves,
            },
        )
    self_attention = spec.submodules.self_attention
    if core_attention in CORE_ATTENTION:
        self_attention.submodules.core_attention = CORE_ATTENTION[core_attention]
    elif documents_apart and chosen == "transformer_engine":
        from megatron_ladder.te.layers.documents import TEDocumentsAttention

        self_attention.submodules.core_attention = TEDocumentsAttention
    return spec


def block_spec(
    config: TransformerConfig,
    specs: Sequence[ModuleSpec],
    impl: TransformerImpl,
    chunk: int | None,
) -> TransformerBlockSubmodules:
    """The specs of the layers of this pipeline stage, or of one of its chunks, and of the final norm.

    Args:
        config: megatron-core's configuration of the whole model.
        specs: of all layers of the model, from `layer_spec`.
        impl: the implementation of the modules, as for `layer_spec`.
        chunk: with the interleaved schedule, the chunk's number in its stage, from 0. Else None.

    Raises:
        UserError: from `resolve_impl`.
    """
    if resolve_impl(impl) == "transformer_engine":
        from megatron.core.extensions.transformer_engine import TENorm as final_norm
    else:
        final_norm = RMSNorm
    first = get_transformer_layer_offset(config, chunk)
    ours = specs[first : first + get_num_layers_to_build(config, chunk)]
    return TransformerBlockSubmodules(layer_specs=list(ours), layer_norm=final_norm)


def _submodules(
    backend: Any,
    kinds: set[Residual],
    qk_layernorm: bool,
    layer_norms: bool = True,
    experts: Any = None,
) -> TransformerLayerSubmodules:
    """Norms, attention and MLP or experts of one layer. Parallel kinds have one norm for attention and
    MLP."""
    norm = backend.layer_norm(rms_norm=True) if layer_norms else IdentityOp
    head_norm = backend.layer_norm(rms_norm=True, for_qk=True) if qk_layernorm else IdentityOp
    # A checkpoint names the norms as Transformer Engine's fused norm + linear does. megatron-core's own
    # local spec does so too. So one checkpoint loads into either implementation.
    checkpoint_names = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    if not kinds <= PARALLEL and experts is None:
        checkpoint_names["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    return TransformerLayerSubmodules(
        input_layernorm=norm,
        self_attention=ModuleSpec(
            module=LocalSelfAttention,
            params={"attn_mask_type": AttnMaskType.causal},
            submodules=SelfAttentionSubmodules(
                linear_qkv=backend.column_parallel_linear(),
                core_attention=backend.core_attention(),
                linear_proj=backend.row_parallel_linear(),
                q_layernorm=head_norm,
                k_layernorm=head_norm,
            ),
        ),
        self_attn_bda=get_bias_dropout_add,
        pre_mlp_layernorm=IdentityOp if kinds <= PARALLEL else norm,
        mlp=experts or get_mlp_module_spec_for_backend(backend=backend),
        mlp_bda=get_bias_dropout_add,
        sharded_state_dict_keys_map=checkpoint_names,
    )
