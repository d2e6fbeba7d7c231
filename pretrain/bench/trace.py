"""`megatron-ladder bench trace`: one step of a decoder, standard and ladder, as timelines."""

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import tyro
from megatron.core import parallel_state

from megatron_ladder.config import ModelConfig, ParallelConfig, Recompute
from megatron_ladder.errors import UserError
from pretrain.bench.decoder import Decoder
from pretrain.bench.ranks import join
from pretrain.bench.recorder import Recorder
from pretrain.bench.timeline import Span, draw, table, write_chrome_trace
from pretrain.bench.wire import over, own_seconds
from pretrain.processes import die_with_parent
from pretrain.ranks import launched_rank
from pretrain.start.launch import become_torchrun


@dataclass(frozen=True)
class TraceOptions:
    """Record one step of a small decoder on local ranks: which collectives fly while what computes.

    Computations are real; a collective is under way for a modelled time, the same for each kind.
    """

    output_dir: tyro.conf.Positional[Path]
    """For trace_standard.json and trace_ladder.json (https://ui.perfetto.dev opens them) and
    timeline.png."""
    tensor_model_parallel_size: int = 2
    """Ranks to start."""
    num_layers: int = 6
    hidden_size: int = 768
    ffn_hidden_size: int = 1536
    num_attention_heads: int = 8
    seq_length: int = 256
    link_ratio: float = 0.5
    """How long an all-reduce is under way, over the forward compute of a sub-module."""
    sequence_parallel: bool = False
    recompute: Recompute = "none"

    def __post_init__(self) -> None:
        if self.num_layers < 2 or self.link_ratio < 0 or self.tensor_model_parallel_size < 2:
            raise UserError(
                "bench trace shows two layers on two ranks: give --num-layers and "
                "--tensor-model-parallel-size of 2 or more, and a --link-ratio of 0 or more"
            )
        if self.seq_length % self.tensor_model_parallel_size and self.sequence_parallel:
            raise UserError(
                f"--seq-length {self.seq_length} is not divisible by --tensor-model-parallel-size "
                f"{self.tensor_model_parallel_size}: --sequence-parallel divides it over the ranks"
            )


def main_trace(options: TraceOptions, argv: list[str]) -> None:
    """Starts the ranks and records a step on each of them; rank 0 writes the files.

    Raises:
        UserError: there is a GPU.
    """
    if torch.cuda.is_available():
        raise UserError(
            "bench trace records host times, which do not show a GPU's streams: hide the GPU "
            'with CUDA_VISIBLE_DEVICES="", or record a GPU with a profiler such as Nsight Systems'
        )
    if launched_rank() is None:
        ranks = options.tensor_model_parallel_size
        become_torchrun(ranks, "--module", "pretrain.cli", "bench", "trace", *argv)
    die_with_parent()
    join(options.tensor_model_parallel_size)
    rows = [(kind, _record(kind, options)) for kind in ("standard", "ladder")]
    is_first = dist.get_rank() == 0
    if is_first:
        options.output_dir.mkdir(parents=True, exist_ok=True)
        for kind, spans in rows:
            write_chrome_trace(options.output_dir / f"trace_{kind}.json", spans)
        middle = options.num_layers // 2
        draw(options.output_dir / "timeline.png", rows, layers=(middle, middle + 1))
    dist.barrier()
    dist.destroy_process_group()
    if is_first:  # printed last, because the program that reads it may have ended (`| head`)
        print(table(rows))
        print(f"\nTimelines: {options.output_dir} (link time modelled, compute measured)")


def _record(kind: Literal["standard", "ladder"], options: TraceOptions) -> list[Span]:
    """Records one step of a decoder of this residual kind; returns the spans of all ranks."""
    parallel = ParallelConfig(
        tensor_model_parallel_size=options.tensor_model_parallel_size,
        sequence_parallel=options.sequence_parallel,
    )
    model = ModelConfig(
        num_layers=options.num_layers,
        hidden_size=options.hidden_size,
        ffn_hidden_size=options.ffn_hidden_size,
        num_attention_heads=options.num_attention_heads,
        vocab_size=128 * options.tensor_model_parallel_size,
        residual=kind,
    )
    decoder = Decoder(
        model,
        parallel,
        micro_batch_size=1,
        seq_length=options.seq_length,
        recompute=options.recompute,
    )
    group = parallel_state.get_tensor_model_parallel_group()
    forwards = [decoder.step()[0] for _ in range(4)][1:]  # the first warms up
    submodule = torch.tensor(statistics.median(forwards) / (2 * options.num_layers))
    dist.broadcast(submodule, src=0)
    message = torch.empty(options.seq_length, 1, options.hidden_size)
    under_way_s = own_seconds(group, message) + options.link_ratio * submodule.item()

    def seconds(operation: str, _size: int) -> float:
        return under_way_s if operation == "all-reduce" else under_way_s / 2

    recorder = Recorder(decoder, dist.get_rank())
    with over(group, seconds, recorder):
        dist.barrier()
        spans = recorder.step()
    everyone: list[list[Span]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, spans)
    return [span for of_rank in everyone for span in of_rank]
