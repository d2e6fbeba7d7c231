"""`megatron-ladder export`, `merge` and `import`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from megatron_ladder.errors import UserError
from pretrain.commands.users import for_users


@dataclass(frozen=True)
class ExportOptions:
    """Write a run's checkpoint as a Hugging Face folder."""

    run: tyro.conf.Positional[Path]
    """The run's folder, or one of its checkpoints."""
    output_dir: tyro.conf.Positional[Path]
    """The folder to make."""
    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """Of the weights; None keeps that of each tensor."""
    max_shard_size: str = "5GB"
    """Larger models are written as several files of at most this."""
    weights: Literal["trained", "ema"] = "trained"
    """ema: their average over the steps, of a run with --optimizer.ema-decay."""
    license: str | None = None
    """For the model card: the hub's name of it, such as apache-2.0."""
    push: str | None = None
    """Then upload the folder to Hugging Face's hub as USER/NAME."""
    private: bool = False
    """With --push: the repository, if it is made, is private."""


@for_users
def export(argv: list[str]) -> int:
    """Writes a run's checkpoint as a Hugging Face folder, and uploads it if asked to."""
    options = tyro.cli(ExportOptions, args=argv, prog="megatron-ladder export")
    if options.private and options.push is None:
        raise UserError(
            "--private needs --push USER/NAME: it makes the repository that is pushed to private"
        )
    from pretrain.convert.export import export_run
    from pretrain.convert.push import check_repository, push_folder

    if options.push is not None:
        check_repository(options.push)
    export_run(
        options.run,
        options.output_dir,
        options.dtype,
        options.max_shard_size,
        options.license,
        options.weights,
    )
    if options.push is not None:
        print(push_folder(options.output_dir, options.push, private=options.private))
    return 0


@dataclass(frozen=True)
class MergeOptions:
    """Write the mean of several checkpoints of a run, for export, eval and --init-from.

    It has weights alone, so no training goes on with it."""

    run: tyro.conf.Positional[Path]
    """The run's folder."""
    last: int | None = None
    """The mean of so many of its newest checkpoints."""
    steps: tuple[int, ...] | None = None
    """Or of the checkpoints of these steps."""
    output_dir: Path | None = None
    """A new folder; None: one in RUN/merged."""


@for_users
def merge(argv: list[str]) -> int:
    """Writes the mean of several checkpoints."""
    options = tyro.cli(MergeOptions, args=argv, prog="megatron-ladder merge")
    from pretrain.convert.merge import merge_run

    print(merge_run(options.run, options.last, options.steps, options.output_dir))
    return 0


@dataclass(frozen=True)
class ImportOptions:
    """Make a run's folder of a Hugging Face model: to train on, to make some layers ladder, to export."""

    model: tyro.conf.Positional[Path]
    """A folder with config.json, safetensors and a tokenizer, or none: Llama, Mistral, Qwen2, Qwen3,
    Mixtral, Qwen3-MoE."""
    output_dir: tyro.conf.Positional[Path]
    """A new folder."""
    ladder_layers: str | None = None
    """Make these ladder layers, with the weights as they are: last:N, all, layers from 0 (4,5,7), or
    auto:N, the N that stand it best on --sample."""
    sample: Path | None = None
    """For auto:N: a data set made with the model's tokenizer."""


@for_users
def import_(argv: list[str]) -> int:
    """Makes a run's folder from a Hugging Face model."""
    options = tyro.cli(ImportOptions, args=argv, prog="megatron-ladder import")
    from pretrain.convert.import_model import import_model

    print(import_model(options.model, options.output_dir, options.ladder_layers, options.sample))
    return 0
