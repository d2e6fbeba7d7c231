"""Writes a checkpoint that has weights alone, as megatron-core would: of an import, or of a mean."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from megatron_ladder import cpu_platform
from megatron_ladder.hf.convert import Chunk
from megatron_ladder.mcore_checkpoints import save_without_tensors
from pretrain.config.train import TrainConfig, save_config
from pretrain.convert.weights import write_weights
from pretrain.run.checkpoint_files import write_manifest
from pretrain.run.folder import checkpoint_step


def write_checkpoint(folder: Path, chunks: Sequence[Chunk], config: TrainConfig, what: str) -> None:
    """Writes a new checkpoint's folder. Each tensor is made just before it is written.

    The caller must see to it that the folder appears when it is complete.

    Args:
        folder: a name of a checkpoint, with its step.
        what: is being done, for the progress bar.
    """
    folder.mkdir(parents=True)
    cpu_platform.enable()
    alone = not dist.is_initialized()
    if alone:  # megatron-core needs a process group
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        step = checkpoint_step(folder)
        progress = {"progress": {"step": step, "consumed_samples": config.samples_after(step)}}
        save_without_tensors(progress, {"weights_only": True}, str(folder))
    finally:
        if alone:
            dist.destroy_process_group()
    quiet = not sys.stderr.isatty()
    with tqdm(total=len(chunks), desc=what, unit=" tensors", leave=False, disable=quiet) as bar:
        facts = write_weights(folder, [_counted(chunk, bar) for chunk in chunks])
    save_config(config, folder / "config.json")
    write_manifest(folder, facts)


def _counted(chunk: Chunk, bar: Any) -> Chunk:
    def make() -> torch.Tensor:
        bar.update()
        return chunk.make()

    return replace(chunk, make=make)
