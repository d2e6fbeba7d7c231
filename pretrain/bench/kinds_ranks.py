"""A rank of `bench kinds`: `python -m pretrain.bench.kinds_ranks FOLDER`, started by kinds.py.

FOLDER has the job (kinds_plan.py). Rank 0 adds a line to its ROWS for each setting, and touches ALIVE at
each pass. A rank that fails leaves its reason as ranks of `train` do (run/ends.py).
"""

import contextlib
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_ladder.collectives.names import ALL_GATHER, REDUCE_SCATTER
from megatron_ladder.config import ParallelConfig
from megatron_ladder.fp8 import Fp8Config
from megatron_ladder.mcore_compat import forget_models
from pretrain.bench.decoder import Decoder
from pretrain.bench.interleaved import measure, slowest
from pretrain.bench.kinds_plan import (
    ALIVE,
    KINDS,
    NO_COMM,
    REPETITIONS,
    ROWS,
    Job,
    Setting,
    of_kind,
    read_job,
)
from pretrain.bench.machine import attention_of, forget_peak, peak_memory, reason
from pretrain.bench.ranks import join
from pretrain.bench.wire import waiting_at_once
from pretrain.processes import die_with_parent
from pretrain.ranks import is_first_rank
from pretrain.run.ends import leave

_ALIKE = (
    *(ValueError, AssertionError, TypeError, AttributeError, ImportError),
    NotImplementedError,  # a RuntimeError: an operation is not there for this device or dtype
)
"""Errors of code that does not know a layout. Ranks run the same code, so all of them raise these."""


def main(folder: Path) -> None:
    """Measures the settings of a job. A failure that is not of one kind alone ends all ranks."""
    die_with_parent()
    job = read_job(folder)
    try:
        for number, setting in enumerate(job.settings):
            gc.collect()
            row = _measured(job, setting, len(job.settings) - number + job.later, folder)
            if is_first_rank():
                with (folder / ROWS).open("a") as file:
                    file.write(json.dumps({**asdict(setting), **row}) + "\n")
            forget_models()
    except Exception as error:
        leave(1, reason(error))
        sys.stderr.flush()
        os._exit(1)  # a collective that other ranks will never start would keep the interpreter
    dist.destroy_process_group()


def _measured(job: Job, setting: Setting, left: int, folder: Path) -> dict[str, Any]:
    """The figures of a setting. Kinds that fail have their reason.

    Args:
        left: the number of settings that share the time that is left, this one among them.
    """
    begin = time.time()
    _join(setting.tensor_model_parallel_size)
    group = parallel_state.get_tensor_model_parallel_group()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    forget_peak()
    failed: dict[str, str] = {}
    decoders: dict[str, Decoder] = {}
    runs: dict[str, Callable[[], tuple[float, ...]]] = {}
    for name in setting.kinds:
        _build(name, job, setting, decoders, failed)
        if name in decoders:
            runs[name] = partial(_pass, decoders[name], KINDS[name].blocking, group, folder)
            _try(name, runs, failed)
            if name in failed:
                del decoders[name]
    own: dict[str, Any] = {}
    if decoders:
        first = next(iter(decoders.values()))
        own = {"attention": attention_of(first.block), **_collectives(first, group)}
    share = (job.end_unix_time - begin) / left
    (limit_s,) = slowest((share - (time.time() - begin),))  # one number for all ranks
    times = measure(runs, REPETITIONS, limit_s) if runs else {}
    return {
        "kinds": {
            name: {"error": failed[name]} if name in failed else {"forward_backward_s": times[name]}
            for name in setting.kinds
        },
        **own,
        **peak_memory(),
    }


def _join(tensor_model_parallel_size: int) -> None:
    """Makes the groups, unless they are there: each new one would keep memory of NCCL's."""
    there = parallel_state.model_parallel_is_initialized()
    if not there or (
        parallel_state.get_tensor_model_parallel_world_size() != tensor_model_parallel_size
    ):
        join(tensor_model_parallel_size)


def _build(
    name: str, job: Job, setting: Setting, decoders: dict[str, Decoder], failed: dict[str, str]
) -> None:
    """Adds the layers of a kind to `decoders`, on the memory of the other kinds' weights."""
    kind = KINDS[name]
    for other, decoder in decoders.items():
        if replace(KINDS[other], blocking=kind.blocking) == kind:  # waited for at once, or not
            decoders[name] = decoder
            return
    parallel = ParallelConfig(
        tensor_model_parallel_size=setting.tensor_model_parallel_size,
        sequence_parallel=setting.sequence_parallel and name != NO_COMM,
        tp_overlap=kind.tp_overlap,
    )
    try:
        made = Decoder(
            of_kind(job.model, kind, setting),
            parallel,
            micro_batch_size=setting.micro_batch_size,
            seq_length=job.seq_length,
            precision=setting.precision,
            fp8=Fp8Config(setting.fp8),
        )
    except (ValueError, ImportError) as error:  # the same on all ranks: nothing has been sent yet
        failed[name] = reason(error)
        return
    kept = {
        (weight, p.shape): p.data
        for other in decoders.values()
        for weight, p in other.block.named_parameters()
    }
    for weight, p in made.block.named_parameters():
        p.data = kept.get((weight, p.shape), p.data)
    decoders[name] = made


def _pass(
    decoder: Decoder, blocking: bool, group: dist.ProcessGroup, folder: Path
) -> tuple[float, float]:
    """Seconds of forward and of backward of one kind."""
    if is_first_rank():
        (folder / ALIVE).touch()
    with waiting_at_once(group) if blocking else contextlib.nullcontext():
        return decoder.step()


def _try(
    name: str, runs: dict[str, Callable[[], tuple[float, ...]]], failed: dict[str, str]
) -> None:
    """Runs a kind once. If it fails, alike on all ranks, it is taken out and the others are measured.

    Raises:
        RuntimeError: of CUDA, cuBLAS or NCCL, which one rank may have alone: then the others wait for it in
            a collective of the layers, so it must end. Out of memory is one, and wants fewer layers.
    """
    said = ""
    try:
        runs[name]()
    except _ALIKE as error:
        said = reason(error)
    (somewhere,) = slowest((float(bool(said)),))
    if somewhere:
        failed[name] = said or "it failed on another rank"
        del runs[name]


def _collectives(decoder: Decoder, group: dist.ProcessGroup) -> dict[str, Any]:
    """Seconds of the collectives of a state by themselves, on ranks that do nothing else."""
    if group.size() == 1:
        return {}
    dtype = next(decoder.block.parameters()).dtype
    whole = torch.zeros(
        decoder.state_bytes // dtype.itemsize, dtype=dtype, device=torch.cuda.current_device()
    )
    part = torch.zeros_like(whole[: whole.numel() // group.size()])

    def scatter_and_gather() -> None:
        getattr(dist, REDUCE_SCATTER)(part, whole, group=group)
        getattr(dist, ALL_GATHER)(whole, part, group=group)

    ways = {
        "all_reduce_s": lambda: dist.all_reduce(whole, group=group),
        "reduce_scatter_all_gather_s": scatter_and_gather,
    }
    return {"state_bytes": decoder.state_bytes} | {
        name: _median_seconds(way) for name, way in ways.items()
    }


def _median_seconds(way: Callable[[], object], *, samples: int = 5, times: int = 8) -> float:
    """Of `way`, run `times` times in a row."""
    found = []
    for _ in range(samples + 1):
        torch.cuda.synchronize()
        dist.barrier()
        begin = time.perf_counter()
        for _ in range(times):
            way()
        torch.cuda.synchronize()
        found.append(slowest((time.perf_counter() - begin,))[0] / times)
    return sorted(found[1:])[samples // 2]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
