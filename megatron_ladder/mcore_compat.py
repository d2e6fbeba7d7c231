"""The one file that names megatron-core's moving parts: its configuration and its model class.

Works with megatron-core 0.16.1 (Python 3.11) and 0.19.2 (Python 3.12 and later).
"""

import contextlib
import functools
import inspect
import logging
import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.distributed.checkpoint.api import CheckpointException

from megatron_ladder.config import (
    Attention,
    ModelConfig,
    ParallelConfig,
    Precision,
    Recompute,
    TransformerImpl,
    check_layout,
)
from megatron_ladder.fp8 import Fp8Config, config_fields
from megatron_ladder.layers.attention_choice import CoreAttention, choose
from megatron_ladder.layers.stages import connect, sent_config
from megatron_ladder.specs import block_spec, layer_spec, resolve_impl

NO_FP8 = Fp8Config()
TORCHS = CoreAttention("torch", "")


def initialize_model_parallel(
    parallel: ParallelConfig, seed: int, *, for_graphs: bool = False
) -> None:
    """Makes megatron-core's process groups and seeds its random states.

    torch.distributed must be initialised. Call `destroy_model_parallel` before a second layout.

    Args:
        seed: of weights and dropout. Each pipeline stage adds 100 times its number.
        for_graphs: random states are generators, which a CUDA graph can hold, and not numbers.
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
    model_parallel_cuda_manual_seed(
        seed, use_cudagraphable_rng=for_graphs, force_reset_rng=for_graphs
    )


def destroy_model_parallel() -> None:
    """Undoes `initialize_model_parallel`; torch.distributed stays.

    megatron-core's own function keeps references to some groups, and RoPE's cache keeps models, which
    hold groups too. A group that stays keeps its threads, and a process forked later would wait for them.
    """
    parallel_state.destroy_model_parallel()
    for name, value in list(vars(parallel_state).items()):
        if isinstance(value, torch.distributed.ProcessGroup):
            setattr(parallel_state, name, None)
    RotaryEmbedding.forward.cache_clear()


@dataclass
class LadderConfig(TransformerConfig):
    """megatron-core's TransformerConfig, and the fields that it has no name for."""

    recompute_submodules: bool = False
    """Full recomputation by this project's layers (recompute.py)."""
    masks_given: bool = False
    """Attention is by the mask that forward gets, [b, 1, s, s], not merely causal."""
    core_attention: CoreAttention = TORCHS
    """Chosen by `transformer_config`, for all layers."""


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
    masks_given: bool = False,
    micro_batch_size: int = 1,
    seq_length: int | None = None,
) -> LadderConfig:
    """Our configuration in megatron-core's terms. The only place that does this translation.

    Raises UserError when the layout cannot cut the model, or the layers have no such attention.

    Args:
        recompute: selective is core attention alone; full is each sub-module.
        attention: whose core attention; it is chosen here for all layers.
        masks_given: attention uses the mask that forward gets, [b, 1, s, s], not the causal one.
        micro_batch_size: attention is chosen for this size.
        seq_length: attention is chosen for this length; None: the model's longest.
    """
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
        # Without dropout it is one addition: a compiled one takes four times the Python to call.
        bias_dropout_fusion=on_gpu and model.hidden_dropout > 0,
        apply_rope_fusion=resolve_impl(impl) == "transformer_engine",
        cross_entropy_loss_fusion=on_gpu and not deterministic,
        masked_softmax_fusion=False,
        # Of local linears, by a kernel of NVIDIA's apex; TE's own: pretrain/model/optimizer.py.
        gradient_accumulation_fusion=on_gpu
        and find_spec("fused_weight_gradient_mlp_cuda") is not None,
        masks_given=masks_given,
        **recompute_fields,
        **config_fields(fp8),
    )
    config.core_attention = choose(
        config,
        attention,
        micro_batch_size=micro_batch_size,
        seq_length=seq_length or model.max_position_embeddings,
    )
    return config


def build_gpt_model(
    model: ModelConfig,
    config: LadderConfig,
    impl: TransformerImpl = "auto",
    *,
    device: torch.device | None = None,
) -> list[GPTModel]:
    """megatron-core's GPTModel with this project's layers: this rank's part.

    Args:
        model: with `vocab_size` set.
        config: `transformer_config` of the same model.
        device: meta makes parameters without data; None: the rank's own device.

    Returns:
        The chunks of this pipeline stage, first to last; one unless it is interleaved. Their
        `config` is for megatron-core's schedules, which read the size of what stages send in it.
    """
    # 0.19 logs that GPTModel is to be replaced by HybridModel; nothing for a user to do.
    logging.getLogger("megatron.core.models.gpt.gpt_model").setLevel(logging.ERROR)
    residuals = model.layer_residuals()
    spec = layer_spec(
        residuals,
        impl,
        desync_interval=model.desync_interval,
        recompute=config.recompute_submodules,
        masks_given=config.masks_given,
        qk_layernorm=model.qk_layernorm,
        core_attention=config.core_attention.whose,
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
        if config.fp8 and config.fp8_recipe == "delayed":
            from megatron_ladder.te.scales import store_scales_as_numbers

            store_scales_as_numbers(gpt)
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


def start_results_queue(initializer: Callable[[], None]) -> None:
    """Starts the process through which writers of checkpoints report, unless it has been started.

    megatron-core would start it without `initializer`, which is called in it.
    """
    if filesystem_async._results_queue is None:
        manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
        manager.start(initializer)
        filesystem_async._results_queue = manager.Queue()


class BackgroundSave:
    """A checkpoint on its way to the disk: copied, or forked off, when this returns; all ranks call alike.

    megatron-core's own asynchronous saving, but for what rank 0 does alone at its end: there an error
    is kept, as those of the writing processes are, where megatron-core leaves the other ranks waiting.

    Args:
        state: megatron-core's sharded state dict.
        folder: exists and is empty.
        content_metadata: kept in the checkpoint, for loading.
        then: called in a rank's writing process with the files it has written; its result comes back.
    """

    def __init__(
        self,
        state: dict[str, Any],
        folder: Path,
        content_metadata: dict[str, Any],
        then: Callable[[list[Path]], dict[str, Any]],
    ) -> None:
        self._folder = folder
        self._strategy = _KeepingErrors("torch_dist", 1)
        self._error = ""
        options: dict[str, Any] = {}
        if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters:  # 0.19
            options["async_strategy"] = "mcore"
            # It logs that this is to be replaced by nvidia-resiliency-ext's; nothing for a user to do.
            logging.getLogger(TorchDistSaveShardedStrategy.__module__).setLevel(logging.ERROR)
        request = dist_checkpointing.save(
            state,
            str(folder),
            sharded_strategy=self._strategy,
            async_sharded_save=True,
            content_metadata=content_metadata,
            **options,
        )
        request.finalize_fns.pop()  # writes metadata.json, as `result` does
        self._receiver, sender = multiprocessing.Pipe(duplex=False)
        self._writes = request.async_fn is not None
        if self._writes:
            write = functools.partial(_write, request.async_fn, then, sender)
            request = request._replace(async_fn=write)
        self._queue = AsyncCallsQueue()
        self._queue.schedule_async_request(request)

    def is_written(self, *, wait: bool) -> bool:
        """Whether all ranks' writing processes have ended, well or not."""
        try:
            return bool(self._queue.maybe_finalize_async_calls(blocking=wait))
        except CheckpointException as failure:  # on all ranks; rank 0 has the reasons
            reasons = [str(error) for error, _ in failure.failures.values()]
            self._error = "; ".join(reasons) or "another rank could not write"
            return True

    def result(self) -> tuple[str, dict[str, Any]]:
        """This rank's error, or "", and what `then` returned. Once, after `is_written`."""
        try:
            if not self._error and self._strategy.error:
                raise self._strategy.error
            if not self._error and torch.distributed.get_rank() == 0:
                save_config(CheckpointingConfig("torch_dist", 1), str(self._folder))
        except OSError as error:
            self._error = str(error)
        if self._error or not self._writes:
            return self._error, {}
        if not self._receiver.poll():
            return "a process that writes checkpoints has ended early", {}
        return "", self._receiver.recv()


def _write(
    write: Callable, then: Callable, sender: Any, rank: int, buckets: list[Any], queue: Any
) -> None:
    write(rank, buckets, queue)
    sender.send(then([Path(path) for path, *_ in buckets]))


class _KeepingErrors(TorchDistSaveShardedStrategy):
    """Rank 0's last file, the tensors' index: an error is kept, since the other ranks wait for it."""

    error: OSError | None = None

    def _get_save_and_finalize_callbacks(self, writer: Any, *args: Any) -> Any:
        finish = writer.finish

        def finish_or_keep(*results: Any) -> None:
            try:
                finish(*results)
            except OSError as error:
                self.error = error

        writer.finish = finish_or_keep
        return super()._get_save_and_finalize_callbacks(writer, *args)
