"""Those parts of megatron-core that change between versions: its configuration and its model class.

Saving and loading are in mcore_checkpoints.py. Works with megatron-core 0.16.1 (Python 3.11) and 0.19.2
(Python 3.12 and later).
"""

import contextlib
import functools
import logging
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec_for_backend
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import init_method_normal

from megatron_ladder import rope
from megatron_ladder.config import (
    STALE,
    Attention,
    ModelConfig,
    ParallelConfig,
    Precision,
    Recompute,
    TransformerImpl,
    check_layout,
    own_layers,
)
from megatron_ladder.fields.experts import megatron_fields
from megatron_ladder.fields.windows import layer_windows
from megatron_ladder.fp8 import Fp8Config, config_fields
from megatron_ladder.inference.experts import DividedExperts
from megatron_ladder.layers.attention.choice import CoreAttention, choose
from megatron_ladder.layers.experts import (
    CountingRouter,
    LocalExperts,
    sum_gradients_over_their_own_ranks,
)
from megatron_ladder.layers.stages import connect, sent_config
from megatron_ladder.specs import (
    LocalBackend,
    block_spec,
    comm_free_backend,
    layer_spec,
    resolve_impl,
)

# 0.16's router asks for it where Transformer Engine is not installed, too.
moe_utils.te_general_gemm = getattr(moe_utils, "te_general_gemm", None)
NO_FP8 = Fp8Config()
TORCHS = CoreAttention("torch", "")


def initialize_model_parallel(
    parallel: ParallelConfig, seed: int, *, for_graphs: bool = False
) -> None:
    """Makes megatron-core's process groups, on a GPU NCCL's alone, and seeds its random states.

    torch.distributed must be initialised, and no layout set (`destroy_model_parallel`). Raises UserError
    when the world size does not fit the layout.

    Args:
        seed: for weights and dropout. A pipeline stage adds 100 times its number.
        for_graphs: keep the random states as generators, which CUDA graphs can use, and not as tensors.
    """
    parallel.data_parallel_size(torch.distributed.get_world_size())
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=1,  # an expert is never cut
        create_gloo_process_groups=False,
    )
    # Stages draw different numbers. Tensor-parallel ranks share the default state, and have one each, too.
    seed += 100 * parallel_state.get_pipeline_model_parallel_rank()
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(
        seed, use_cudagraphable_rng=for_graphs, force_reset_rng=for_graphs
    )


def destroy_model_parallel() -> None:
    """Destroys the process groups of `initialize_model_parallel`. torch.distributed stays initialised.

    megatron-core's own function keeps references to some groups, and RoPE's cache keeps models, which
    refer to groups too. Such a group keeps its threads, and a process forked later would wait for them.
    """
    parallel_state.destroy_model_parallel()
    for name, value in list(vars(parallel_state).items()):
        if isinstance(value, torch.distributed.ProcessGroup):
            setattr(parallel_state, name, None)
    forget_models()


def forget_models() -> None:
    """Lets models that nothing else refers to be freed: RoPE's cache keeps them."""
    RotaryEmbedding.forward.cache_clear()


@dataclass
class LadderConfig(TransformerConfig):
    """megatron-core's TransformerConfig, with six more fields."""

    own_layers: bool = True
    """The layers are this project's, not megatron-core's TransformerLayer."""
    halves: bool = False
    """Each sub-module runs on two halves of a micro-batch in turn."""
    recompute_submodules: bool = False
    """This project's layers do full recomputation (recompute.py)."""
    documents_apart: bool = False
    """Forward gets the documents of each micro-batch, which do not attend to each other."""
    core_attention: CoreAttention = TORCHS
    """The core attention of all layers. `transformer_config` chooses it."""
    inference: bool = False
    """For an inference engine."""


def transformer_config(
    model: ModelConfig,
    parallel: ParallelConfig,
    *,
    precision: Precision = "fp32",
    impl: TransformerImpl = "auto",
    recompute: Recompute = "none",
    deterministic: bool = False,
    fp8: Fp8Config = NO_FP8,
    attention: Attention = "auto",
    documents_apart: bool = False,
    micro_batch_size: int = 1,
    seq_length: int | None = None,
    inference: bool = False,
) -> LadderConfig:
    """Translates this project's configuration to megatron-core's. No other code does this.

    Raises UserError when the layout does not fit the model, or the layers do not have that attention.

    Args:
        recompute: selective recomputes core attention alone, full recomputes each sub-module.
        attention: which core attention; auto is resolved here, for all layers.
        documents_apart: forward gets the documents of each micro-batch, as packed_seq_params.
        micro_batch_size: attention is chosen for this size; in halves for half of it.
        seq_length: attention is chosen for this length. None: the model's max_position_embeddings.
        inference: for an inference engine, whose tensor-parallel ranks have the same tokens.
    """
    check_layout(model, parallel, inference=inference)
    ours, halves = own_layers(model, parallel), parallel.tp_overlap == "halves"
    on_gpu = torch.cuda.is_available()
    recompute_fields: dict[str, Any] = {}
    if recompute == "selective":
        recompute_fields = {
            "recompute_granularity": "selective",
            "recompute_modules": ["core_attn"],
        }
    elif recompute == "full" and ours:
        recompute_fields = {"recompute_submodules": True}
    elif recompute == "full":
        recompute_fields = {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    config = LadderConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.kv_heads,
        kv_channels=model.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=model.layernorm_epsilon,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=model.add_qkv_bias,
        qk_layernorm=model.qk_layernorm,
        hidden_dropout=model.hidden_dropout,
        attention_dropout=model.attention_dropout,
        init_method_std=model.init_method_std,
        # None: megatron-core divides the initial weights of each sub-module's last linear by sqrt(2 L).
        # Outputs that are scaled are not scaled twice.
        output_layer_init_method=(
            None if model.residual_scaling == "none" else init_method_normal(model.init_method_std)
        ),
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        sequence_parallel=parallel.sequence_parallel and parallel.tensor_model_parallel_size > 1,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        num_layers_in_first_pipeline_stage=parallel.num_layers_in_first_pipeline_stage,
        num_layers_in_last_pipeline_stage=parallel.num_layers_in_last_pipeline_stage,
        # In the interleaved schedule two stages exchange several tensors in both directions. Batched
        # sends and receives would be matched in the wrong order, without an error.
        overlap_p2p_comm=parallel.num_chunks > 1,
        batch_p2p_comm=parallel.num_chunks == 1,
        context_parallel_size=parallel.context_parallel_size,
        # Transformer Engine's ring, which sends keys and values while it computes. It has no windows: there
        # keys and values are gathered.
        cp_comm_type="p2p" if model.sliding_window is None else "all_gather",
        bf16=precision == "bf16",
        params_dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
        pipeline_dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
        # On the CPU weights are drawn whole from one seed, then cut: they are the same at every TP size.
        use_cpu_initialization=not on_gpu,
        transformer_impl=resolve_impl(impl),
        deterministic_mode=deterministic and on_gpu,
        # These fusions are compiled by torch.compile or are CUDA kernels: they are faster on a GPU only.
        bias_activation_fusion=on_gpu,
        # Without dropout it is one addition; to call a compiled addition takes four times the Python.
        bias_dropout_fusion=on_gpu and model.hidden_dropout > 0,
        apply_rope_fusion=resolve_impl(impl) == "transformer_engine",
        cross_entropy_loss_fusion=on_gpu and not deterministic,
        masked_softmax_fusion=False,
        softmax_scale=rope.softmax_scale(model),
        **_windows(model),
        # For local linears, with a kernel of NVIDIA's apex. pretrain/optim/optimizer.py sets TE's.
        gradient_accumulation_fusion=on_gpu
        and find_spec("fused_weight_gradient_mlp_cuda") is not None,
        documents_apart=documents_apart,
        inference=inference,
        own_layers=ours,
        halves=halves,
        **recompute_fields,
        **config_fields(fp8),
        **megatron_fields(model, parallel, grouped=resolve_impl(impl) == "transformer_engine"),
    )
    config.core_attention = choose(
        config,
        attention,
        micro_batch_size=max(1, micro_batch_size // (1 + halves)),
        seq_length=seq_length or model.max_position_embeddings,
    )
    return config


def build_gpt_model(
    model: ModelConfig,
    config: LadderConfig,
    impl: TransformerImpl = "auto",
    *,
    device: torch.device | None = None,
    blocks_only: bool = False,
) -> list[GPTModel]:
    """Builds this rank's part of megatron-core's GPTModel, with this project's layers.

    Args:
        model: with `vocab_size` set.
        config: from `transformer_config` of the same model.
        device: meta makes parameters without data. None: the rank's own device.
        blocks_only: without embedding, final norm and output layer; forward takes what `set_input_tensor`
            got.

    Returns:
        The chunks of this pipeline stage, first to last; one unless the schedule is interleaved. Their
        `config` is for megatron-core's schedules, which take the shape of the sent tensors from it.
    """
    # 0.19 logs that HybridModel will replace GPTModel. A user need not act on that.
    logging.getLogger("megatron.core.models.gpt.gpt_model").setLevel(logging.ERROR)
    residuals = model.layer_residuals()
    spec_with = functools.partial(
        layer_spec,
        *(residuals, impl),
        residual_scaling=model.residual_scaling,
        layer_norms=model.layer_norms,
        desync_interval=model.desync_interval,
        recompute=config.recompute_submodules,
        halves=config.halves,
        documents_apart=config.documents_apart,
        qk_layernorm=model.qk_layernorm,
        core_attention=config.core_attention.whose,
    )
    have_experts = model.experts.layers(model.num_layers)
    kinds = {
        experts: spec_with(_experts_spec(config) if experts else None, divided=_divided(config))
        for experts in set(have_experts)
    }
    specs = [kinds[experts] for experts in have_experts]
    count = config.virtual_pipeline_model_parallel_size or 1
    seen_by_schedules = sent_config(config, sends_pair=bool(STALE.intersection(residuals)))
    chunks = []
    for number in range(count):
        chunk = number if count > 1 else None
        with device or contextlib.nullcontext():
            gpt = GPTModel(
                config=config,
                transformer_layer_spec=block_spec(config, specs, impl, chunk),
                vocab_size=model.padded_vocab_size,
                max_sequence_length=model.max_position_embeddings,
                pre_process=not blocks_only
                and parallel_state.is_pipeline_first_stage(False, chunk),
                post_process=not blocks_only
                and parallel_state.is_pipeline_last_stage(False, chunk),
                share_embeddings_and_output_weights=model.share_embeddings_and_output_weights,
                position_embedding_type="rope",
                rotary_base=model.rotary_base,
                vp_stage=chunk,
            )
        theirs = gpt.rotary_pos_emb.inv_freq
        gpt.rotary_pos_emb.inv_freq = rope.frequencies(model).to(theirs.device)
        if config.softmax_scale is not None:  # for attention over the inference engine's cache
            for layer in gpt.decoder.layers:
                layer.self_attention.softmax_scale = config.softmax_scale
        if config.own_layers:
            connect(list(gpt.decoder.layers))
        sum_gradients_over_their_own_ranks(gpt)
        if config.fp8 and config.fp8_recipe == "delayed":
            from megatron_ladder.te.scales import store_scales_as_numbers

            store_scales_as_numbers(gpt)
        gpt.config = seen_by_schedules
        chunks.append(gpt.to(device or torch.cuda.current_device()))
    return chunks


def _divided(config: LadderConfig) -> bool:
    """Whether each rank runs its experts on all tokens, and the outputs are summed."""
    return config.inference and config.tensor_model_parallel_size > 1


def _experts_spec(config: LadderConfig) -> Any:
    """The spec of a mixture of experts: megatron-core's, with a router that counts."""
    grouped = config.moe_grouped_gemm
    if grouped:
        from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

        backend: Any = TESpecProvider()
    else:
        backend = LocalBackend()
    spec, parts = _megatron_experts(backend, config)
    parts.router = CountingRouter
    if not grouped:
        experts = parts.experts
        parts.experts = (
            ModuleSpec(module=LocalExperts, submodules=experts.submodules)
            if isinstance(experts, ModuleSpec)
            else functools.partial(LocalExperts, **experts.keywords)
        )
    if _divided(config):
        _, partial = _megatron_experts(comm_free_backend(grouped), config)
        parts.shared_experts = partial.shared_experts
        sums = not config.own_layers
        if isinstance(spec, ModuleSpec):
            return ModuleSpec(module=DividedExperts, submodules=parts, params={"sums": sums})
        return functools.partial(DividedExperts, submodules=parts, sums=sums)
    return spec


def _megatron_experts(backend: Any, config: LadderConfig) -> tuple[Any, Any]:
    """megatron-core's spec, and its sub-modules, which the caller may change."""
    spec: Any = get_moe_module_spec_for_backend(
        backend, num_experts=config.num_moe_experts, moe_grouped_gemm=config.moe_grouped_gemm
    )
    # 0.16 has a ModuleSpec of both, 0.19 a partial function.
    return spec, spec.submodules if isinstance(spec, ModuleSpec) else spec.keywords["submodules"]


def _windows(model: ModelConfig) -> dict[str, Any]:
    if model.sliding_window is None:
        return {}
    windows = layer_windows(model)
    return {
        "window_size": (model.sliding_window - 1, 0),  # tokens before and behind a token
        "window_attn_skip_freq": None if None not in windows else [w is not None for w in windows],
    }
