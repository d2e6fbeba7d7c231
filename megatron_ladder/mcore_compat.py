"""The one file that names megatron-core's moving parts: its configuration and its model class.

Works with megatron-core 0.16.1 (Python 3.11) and 0.19.2 (Python 3.12 and later).
"""

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ladder.config import (
    ModelConfig,
    ParallelConfig,
    Precision,
    Recompute,
    TransformerImpl,
    check_layout,
)
from megatron_ladder.specs import block_spec, layer_spec, resolve_impl
from megatron_ladder.stages import connect, sent_config


def initialize_model_parallel(parallel: ParallelConfig, seed: int) -> None:
    """Makes megatron-core's process groups and seeds its random states.

    torch.distributed must be initialised. Call `destroy_model_parallel` before a second layout.
    """
    parallel.data_parallel_size(torch.distributed.get_world_size())
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
    )
    # Stages draw different weights and dropout; tensor-parallel ranks share the first random state
    # and have one each of their own in megatron-core's tracker.
    seed += 100 * parallel_state.get_pipeline_model_parallel_rank()
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)


def destroy_model_parallel() -> None:
    """Undoes `initialize_model_parallel`; torch.distributed stays.

    megatron-core's own keeps some names of groups, and RoPE's cache keeps models, which have them. With a
    group live its threads: a process forked later would wait for them.
    """
    parallel_state.destroy_model_parallel()
    for name, value in list(vars(parallel_state).items()):
        if isinstance(value, torch.distributed.ProcessGroup):
            setattr(parallel_state, name, None)
    RotaryEmbedding.forward.cache_clear()


@dataclass
class LadderConfig(TransformerConfig):
    """megatron-core's configuration, and what it has no name for."""

    recompute_submodules: bool = False
    """Full recomputation by this project's layers (recompute.py)."""


def transformer_config(
    model: ModelConfig,
    parallel: ParallelConfig,
    *,
    precision: Precision = "fp32",
    impl: TransformerImpl = "auto",
    recompute: Recompute = "none",
    deterministic: bool = False,
) -> LadderConfig:
    """Our configuration in megatron-core's terms. The only place that does this translation."""
    check_layout(model, parallel)
    on_gpu = torch.cuda.is_available()
    recompute_fields: dict[str, Any] = {}
    if recompute == "selective":
        recompute_fields = {
            "recompute_granularity": "selective",
            "recompute_modules": ["core_attn"],
        }
    elif recompute == "full" and not model.is_standard:
        recompute_fields = {"recompute_submodules": True}
    elif recompute == "full":
        recompute_fields = {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    return LadderConfig(
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
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        sequence_parallel=parallel.sequence_parallel and parallel.tensor_model_parallel_size > 1,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        num_layers_in_first_pipeline_stage=parallel.num_layers_in_first_pipeline_stage,
        num_layers_in_last_pipeline_stage=parallel.num_layers_in_last_pipeline_stage,
        # Interleaved, two stages exchange several tensors in both directions: batched, they would
        # be matched in the wrong order, silently.
        overlap_p2p_comm=parallel.num_chunks > 1,
        batch_p2p_comm=parallel.num_chunks == 1,
        context_parallel_size=parallel.context_parallel_size,
        bf16=precision == "bf16",
        params_dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
        pipeline_dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
        # Weights drawn on the CPU from one seed and then cut: the same at every TP size.
        use_cpu_initialization=not on_gpu,
        transformer_impl=resolve_impl(impl),
        deterministic_mode=deterministic and on_gpu,
        # These are torch.compile'd or CUDA kernels: a win on a GPU only.
        bias_activation_fusion=on_gpu,
        bias_dropout_fusion=on_gpu,
        cross_entropy_loss_fusion=on_gpu and not deterministic,
        masked_softmax_fusion=False,
        # Weight gradients added to DDP's fp32 buffer by the GEMM itself: a kernel of NVIDIA's apex.
        gradient_accumulation_fusion=on_gpu
        and find_spec("fused_weight_gradient_mlp_cuda") is not None,
        **recompute_fields,
    )


def build_gpt_model(
    model: ModelConfig,
    config: LadderConfig,
    impl: TransformerImpl = "auto",
    *,
    masks_given: bool = False,
    device: torch.device | None = None,
) -> list[GPTModel]:
    """megatron-core's GPTModel with this project's layers: this rank's part.

    Args:
        model: with `vocab_size` set.
        config: `transformer_config` of the same model.
        masks_given: attention is by the mask that forward gets, [b, 1, s, s], not merely causal.
        device: meta makes parameters without data; None: the rank's own device.

    Returns:
        The chunks of this pipeline stage, first to last; one unless it is interleaved. Their
        `config` is the one megatron-core's schedules shall see (stages.py).
    """
    # 0.19 logs that GPTModel is to be replaced by HybridModel; nothing for a user to do.
    logging.getLogger("megatron.core.models.gpt.gpt_model").setLevel(logging.ERROR)
    residuals = model.layer_residuals()
    spec = layer_spec(
        residuals,
        impl,
        desync_interval=model.desync_interval,
        recompute=config.recompute_submodules,
        masks_given=masks_given,
        qk_layernorm=model.qk_layernorm,
    )
    count = config.virtual_pipeline_model_parallel_size or 1
    seen_by_schedules = sent_config(config, sends_pair="ladder" in residuals)
    chunks = []
    for number in range(count):
        chunk = number if count > 1 else None
        with device or contextlib.nullcontext():
            gpt = GPTModel(
                config=config,
                transformer_layer_spec=block_spec(config, spec, impl, chunk),
                vocab_size=model.padded_vocab_size,
                max_sequence_length=model.max_position_embeddings,
                pre_process=parallel_state.is_pipeline_first_stage(False, chunk),
                post_process=parallel_state.is_pipeline_last_stage(False, chunk),
                share_embeddings_and_output_weights=model.share_embeddings_and_output_weights,
                position_embedding_type="rope",
                rotary_base=model.rotary_base,
                **_rope_scaling(model),
                vp_stage=chunk,
            )
        if not model.is_standard:
            connect(list(gpt.decoder.layers))
        gpt.config = seen_by_schedules
        chunks.append(gpt.to(device or torch.cuda.current_device()))
    return chunks


def _rope_scaling(model: ModelConfig) -> dict[str, Any]:
    if model.rope_scaling_factor is None:
        return {}
    if model.rope_scaling_type == "linear":
        return {"seq_len_interpolation_factor": model.rope_scaling_factor}
    return {"rope_scaling": True, "rope_scaling_factor": model.rope_scaling_factor}


def align_checkpoint_ranges(ddp: Any) -> None:
    """Call before the optimizer is built: it mends megatron-core's reshardable checkpoints.

    Saving joins the buckets of a gradient buffer without the padding at their ends, and then cuts
    parameters out at offsets that count it: with several buckets, as a shared embedding on two
    pipeline stages makes them, Adam's moments and master weights are saved shifted. Counted as data,
    the padding stays in.
    """
    for buffer in ddp.buffers:
        for bucket in buffer.buckets:
            bucket.numel_unpadded = bucket.grad_data.numel()
        buffer.numel_unpadded = buffer.numel


def save_without_tensors(
    state: dict[str, Any], content_metadata: dict[str, Any], folder: str
) -> None:
    """Writes what a checkpoint holds beside tensors, so that these may be written by others (DCP).

    0.19 keeps it among the tensors, whose list the others write anew, but reads 0.16's file as well.
    """
    # Copied: saving adds to it.
    dist_checkpointing.save(dict(state), folder, content_metadata=content_metadata)
    common = Path(folder) / "common.pt"
    if not common.exists():
        torch.save({**state, "content_metadata": content_metadata}, common)


@contextlib.contextmanager
def loading_optimizer(optimizer: Any) -> Iterator[None]:
    """Load a checkpoint into the optimizer inside this: it mends megatron-core for torch's AdamW.

    torch's keeps a `step` tensor for every parameter, which megatron-core's distributed optimizer
    reads before it exists, then does not find among the loaded tensors, and then makes one tensor
    shared by all parameters. With TE's or apex's fused Adam there is nothing to mend.
    """
    adams = [o for o in optimizer.chained_optimizers if isinstance(o.optimizer, torch.optim.AdamW)]
    for chained in adams:
        for group in chained.optimizer.param_groups:
            for parameter in group["params"]:
                chained.optimizer.state[parameter] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        chained._set_main_param_and_optimizer_states = _keeping_step(chained)
    yield
    for chained in adams:
        del chained._set_main_param_and_optimizer_states
        for state in chained.optimizer.state.values():
            # AdamW adds 1 to it in place: shared, it would count every parameter.
            state["step"] = state["step"].clone()


def _keeping_step(chained: Any) -> Callable[[Any, dict[str, Any]], None]:
    """The optimizer's own setter of one parameter's state, which leaves `step` as it is."""
    set_states = chained._set_main_param_and_optimizer_states

    def set_states_but_step(model_param: Any, tensors: dict[str, Any]) -> None:
        step = chained._get_main_param_and_optimizer_states(model_param)["step"]
        set_states(model_param, {"step": step, **tensors})

    return set_states_but_step
