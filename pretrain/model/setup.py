"""Starts ranks and process groups, and builds the model with its optimizer."""

import os
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_ladder import cpu_platform
from megatron_ladder.errors import UserError
from megatron_ladder.mcore_compat import (
    LadderConfig,
    build_gpt_model,
    initialize_model_parallel,
    transformer_config,
)
from megatron_ladder.side.config import SideConfig
from megatron_ladder.side.model import SideTunedModel, side_tuned
from pretrain.config.train import TrainConfig
from pretrain.model.compiled import compile_layers
from pretrain.model.graphs import use_own_stream
from pretrain.model.queues import set_queues
from pretrain.optim.optimizer import build_optimizer, build_scheduler, wrap_data_parallel
from pretrain.ranks import launched_rank, take_gpu

_ORDERED = ("Ring", "Tree")  # NCCL's algorithms that add in an order of their own

# The longest time between the start of the first rank and that of the last one.
_MEETING = timedelta(hours=1)


def meet() -> Any:
    """Waits until all ranks that torchrun or srun has started are there. Called by every rank, once.

    Returns:
        The store that they share, for `start_ranks`.

    Raises:
        OSError: they did not meet.
    """
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=_MEETING))
    except (dist.DistNetworkError, dist.DistStoreError) as error:  # also a port that is in use
        place = f"MASTER_ADDR {os.environ['MASTER_ADDR']}, MASTER_PORT {os.environ['MASTER_PORT']}"
        raise OSError(None, f"the ranks did not meet: {error}", place) from error
    return store


def start_ranks(config: TrainConfig, store: Any = None) -> str:
    """Joins the ranks that torchrun started, or makes a world of one rank, and megatron-core's groups.

    Args:
        store: of `meet`, where it has been called.

    Returns:
        The device's name: "cpu", or the GPU's.
    """
    set_queues(config)
    if config.deterministic:
        make_repeatable()
    if cpu_platform.enable():
        backend, device = "gloo", "cpu"
    else:
        take_gpu()
        if config.cuda_graph:
            use_own_stream()
        backend, device = "nccl", torch.cuda.get_device_name()
    # The number of collectives that torch's flight recorder keeps. The watchdog writes them to a file.
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    if rank := launched_rank():
        # The longest time that a rank waits for the others, also when they have failed.
        timeout = timedelta(seconds=config.faults.allowance_s)
        store = store or meet()
        store.set_timeout(timeout)
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("ranks", store),
            rank=rank.number,
            world_size=rank.world_size,
            timeout=timeout,
        )
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    initialize_model_parallel(config.parallel, config.seed, for_graphs=config.cuda_graph)
    return device


def make_repeatable() -> None:
    """Asks CUDA's libraries for sums that are the same each time. Call it before they start.

    Raises:
        UserError: the environment asks NCCL for an algorithm whose sums may differ.
    """
    # cuBLAS needs a workspace of fixed size for bitwise repeatable sums.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
    # NVLS lets the switch add, in the order in which the GPUs' data arrive.
    given = os.environ.setdefault("NCCL_ALGO", ",".join(_ORDERED))
    names = {name.strip().lower() for name in given.split(",")}
    if not names <= {name.lower() for name in _ORDERED} and given != "^NVLS":
        raise UserError(
            f"--deterministic: NCCL_ALGO is {given} in the environment, and the order of its sums may "
            f"change. Unset it, or give {' or '.join(_ORDERED)}"
        )
    torch.use_deterministic_algorithms(True)


def smallest_card() -> int:
    """Memory in bytes of the smallest GPU of all ranks. Every rank gets the same number."""
    here = torch.cuda.current_device()
    size = torch.tensor(torch.cuda.get_device_properties(here).total_memory, device=here)
    dist.all_reduce(size, dist.ReduceOp.MIN)
    return int(size.item())


def stop_ranks() -> None:
    """Waits for all ranks, then ends torch's process group."""
    dist.barrier()
    dist.destroy_process_group()


def layers_config(config: TrainConfig) -> LadderConfig:
    """megatron-core's configuration of the model. The core attention is chosen here (attention/choice.py),
    which asks Transformer Engine what it would use."""
    return transformer_config(
        config.model,
        config.parallel,
        precision=config.precision,
        impl=config.transformer_impl,
        recompute=config.recompute,
        deterministic=config.deterministic,
        fp8=config.fp8,
        attention=config.attention,
        documents_apart=not config.data.attend_across_documents,
        micro_batch_size=config.micro_batch_size,
        seq_length=config.data.seq_length,
    )


def _build_side(config: TrainConfig) -> list[SideTunedModel]:
    side, parallel, impl = config.side, config.parallel, config.transformer_impl
    alone = replace(config, side=SideConfig(), model=side.backbone(config.model))
    layers = layers_config(alone)
    layers.gradient_accumulation_fusion = False  # into buffers that the backbone does not have
    backbone = build_gpt_model(alone.model, layers, impl)
    # The blocks do not run in halves.
    whole = replace(parallel, tp_overlap="none")
    blocks = layers_config(replace(alone, model=side.model(config.model), parallel=whole))
    return side_tuned(backbone, config.model, side, parallel, blocks, impl)


def build(config: TrainConfig) -> tuple[list[Any], Any, Any]:
    """Builds this rank's part of the model.

    Returns:
        The chunks in DDP, their optimizer, and its learning-rate schedule. With a side network each chunk
        is a SideTunedModel, whose backbone has no weights yet.
    """
    chunks: list[Any]
    if config.side.is_on:
        chunks = _build_side(config)
    else:
        chunks = build_gpt_model(config.model, layers_config(config), config.transformer_impl)
    if config.compile:
        compile_layers(chunks)
    model = wrap_data_parallel(chunks, gather_at_once=config.compile or config.cuda_graph)
    optimizer = build_optimizer(model, config)
    return model, optimizer, build_scheduler(optimizer, config)
