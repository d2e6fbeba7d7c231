"""Exports a run's checkpoint as a Hugging Face folder."""

import functools
import logging
import re
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch

from megatron_ladder.errors import UserError
from megatron_ladder.hf.end_ids import end_ids, one_or_several, several
from megatron_ladder.hf.export import export_folder
from megatron_ladder.hf.fields import check_fields
from megatron_ladder.hf.files.output import complete_or_absent, refuse_others
from megatron_ladder.hf.files.stored import weight_files
from megatron_ladder.hf.from_hf import architecture_of
from megatron_ladder.hf.model_config import to_hf_config
from megatron_ladder.json_files import in_words, read_json
from megatron_ladder.reading.plain_files import refuse_links
from pretrain.config.train import TrainConfig, load_config
from pretrain.convert.import_tokenizer import has_tokenizer
from pretrain.convert.plain_model import one_rank_model
from pretrain.convert.verify_export import verify_export
from pretrain.convert.weights import run_weights
from pretrain.data.folders import DataFolder, kept_facts, labels
from pretrain.files import sha256
from pretrain.run.folder import MERGED, checkpoint_step, find_checkpoint
from pretrain.run.metrics import read_metrics

logger = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def export_run(
    run: Path,
    output_dir: Path,
    dtype: str | None,
    max_shard_size: str,
    license: str | None = None,
    which: Literal["trained", "ema"] = "trained",
) -> Path:
    """Writes the newest checkpoint of a run (or the given one) as a Hugging Face folder.

    The folder appears only after its logits were compared with the run's (verify_export.py).

    Args:
        run: the run's folder, or a checkpoint of it.
        output_dir: the folder to make. If it is the export already, nothing is done; if it holds
            something else, it is refused.
        dtype: "fp32", "bf16" or "fp16"; None keeps that of each tensor.
        max_shard_size: the largest size of one safetensors file, such as "5GB".
        license: for the model card, as Hugging Face's hub names it, such as "apache-2.0".
        which: the weights that were trained, or their average.

    Returns:
        `output_dir`.

    Raises:
        UserError: there is no such run or checkpoint, the output is in use, the size or the license is
            malformed, weights are NaN or infinite, or the folder's logits differ from the run's.
    """
    if not re.fullmatch(r"\d+[KMGT]?B", max_shard_size):
        raise UserError(f"--max-shard-size {max_shard_size}: give a size such as 500MB or 5GB")
    if license is not None and not re.fullmatch(r"[a-z0-9.+-]+", license):
        raise UserError(
            f"--license {license}: give one of the hub's names, such as apache-2.0, mit, llama3.2 or other"
        )
    checkpoint = find_checkpoint(run)
    config = load_config(checkpoint / "config.json")
    model = one_rank_model(config.model, config.parallel.tensor_model_parallel_size, run)
    data = kept_facts(checkpoint.parents[1])[0]
    weights = run_weights(checkpoint, which)
    eod_id = data.tokenizer["eod_id"] if data.has_tokenizer else None
    hf_config = to_hf_config(model, eod_id, config.side)
    begins_with = data.tokenizer.get("bos_id") if data.has_tokenizer else None
    hf_config.bos_token_id = begins_with
    imported = checkpoint.parents[1] / "imported"
    refuse_links(imported, home=checkpoint.parents[1])
    if imported.is_dir():  # an imported model keeps its own special tokens and tokenizer files
        original = read_json(imported / "config.json", "a model's configuration")
        check_fields(original, imported / "config.json")
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(hf_config, name, original.get(name))
        if not several(hf_config.eos_token_id):  # generation_config.json has it
            hf_config.eos_token_id = one_or_several(end_ids(imported))
        if not config.data.paths:  # as it was imported
            hf_config.dtype = _stated_dtype(original)
    as_dtype = DTYPES[dtype] if dtype else None
    facts = _facts(checkpoint, config, which)
    for limit in facts.get("limits", ()):
        logger.info("%s: %s", run, limit)
    export = functools.partial(
        export_folder,
        weights,
        hf_config,
        _tokenizer(imported, data),
        end_ids=(data.tokenizer["eod_id"],) if data.has_tokenizer else (),
        begins_with=begins_with,
        max_shard_size=max_shard_size,
        dtype=as_dtype,
        model_card_facts={**facts, "license": license},
    )
    if (output_dir / "config.json").is_file():
        _refuse_other_models(output_dir, checkpoint, export)
        logger.info("%s is the export of %s: nothing to do", output_dir, checkpoint)
        return output_dir
    with complete_or_absent(output_dir) as folder:
        export(folder)
        found = verify_export(folder, weights, model, as_dtype, config.side)
    logger.info("%s: %s", output_dir, found)
    return output_dir


def _refuse_other_models(output_dir: Path, checkpoint: Path, export: Callable[..., object]) -> None:
    """Raises UserError when a folder is not what `export` would make of a checkpoint, byte by byte.

    So a job that is started again after its export has completed goes on. Files whose names begin with a
    dot may be added: the hub's client makes some.
    """
    with TemporaryDirectory() as scratch:
        made = Path(scratch) / "model"
        try:
            export(made, compare_with=output_dir)
            names = {str(path.relative_to(made)) for path in made.rglob("*") if path.is_file()}
            refuse_others(output_dir, ((name, (made / name).read_bytes()) for name in names))
            names |= set(weight_files(made))
            for path in (path for path in output_dir.rglob("*") if path.is_file()):
                name = path.relative_to(output_dir)
                if str(name) not in names and not name.parts[0].startswith("."):
                    raise UserError(f"{path} is not part of it")
        except UserError as error:
            raise UserError(
                f"{output_dir} is not empty and not the export of {checkpoint} with these options: "
                f"{error}. Choose another output folder, or remove it"
            ) from error


def _tokenizer(imported: Path, data: DataFolder) -> Path:
    """The other model's files, or the tokenizer of the data where these have none or are not there."""
    if not data.has_tokenizer:
        return imported
    of_import = has_tokenizer(imported)
    file = (imported if of_import else data.path) / data.tokenizer["file"]
    if file.is_file() and sha256(file) != data.tokenizer["sha256"]:
        raise UserError(
            f"{file} is damaged: its SHA-256 is not that in {data.path / 'manifest.json'}: put the right "
            "file back"
        )
    return imported if of_import else file


def _stated_dtype(original: dict[str, Any]) -> torch.dtype | None:
    """The dtype that a config.json gives: older ones call it torch_dtype. None: it gives none."""
    name = str(original.get("dtype") or original.get("torch_dtype")).removeprefix("torch.")
    return next((dtype for dtype in DTYPES.values() if str(dtype) == f"torch.{name}"), None)


def _facts(checkpoint: Path, config: TrainConfig, which: str) -> dict[str, Any]:
    """The facts for the model card: the run's origin, its data, and its figures at the exported step."""
    step = checkpoint_step(checkpoint)
    run_dir = checkpoint.parents[1]
    facts: dict[str, Any] = {"name": run_dir.resolve().name}
    if (original := run_dir / "imported" / "config.json").is_file():
        facts["origin"] = architecture_of(read_json(original, "a model's configuration"))
    if not config.data.paths:  # an imported model that was not trained since
        return facts
    # Other data sets may have joined the run after this checkpoint.
    folders = kept_facts(run_dir, config.data.paths)[: len(config.data.paths)]
    data = {
        label: f"{folder.tokens('train'):,} tokens for training, from {_sources(folder)}"
        for label, folder in zip(labels(folders), folders, strict=True)
    }
    tokenizer = folders[0].tokenizer
    data["Tokenizer"] = (
        f"{tokenizer['kind']}, {tokenizer['vocab_size']:,} tokens, SHA-256 {tokenizer['sha256']}"
    )
    training = {
        "Steps": f"{step:,} of {config.train_steps:,}",
        "Tokens": f"{config.tokens_after(step):,}",
        "Sequence length": config.data.seq_length,
        "Global batch size": f"{config.global_batch_size} sequences",
        "Peak learning rate": f"{config.optimizer.lr:g} ({config.schedule.decay})",
        "Precision": config.precision,
        "Tensor-parallel size": config.parallel.tensor_model_parallel_size,
    }
    facts |= {"data": data, "training": training}
    if (factor := config.model.experts.moe_expert_capacity_factor) is not None:
        facts["limits"] = [
            f"In training an expert took at most {factor:g} times the mean number of tokens. Here no token "
            "is dropped, so outputs differ where an expert was full."
        ]
    # The losses of a run are those of its trained weights.
    if which == "ema":
        decay = config.optimizer.ema_decay
        training["Weights"] = f"the average over the steps, with a decay of {decay}"
        return facts
    if (run_dir / MERGED).is_file():
        steps = read_json(run_dir / MERGED, "what a mean is of").get("steps")
        training["Weights"] = f"the mean of the checkpoints of steps {in_words(str(steps))}"
        return facts
    for line in read_metrics(run_dir):
        # Later lines replace earlier ones, so the last validation up to the step stays.
        if line["kind"] == "validation" and line["step"] <= step:
            training[f"Validation loss ({line['dataset']})"] = (
                f"{line['loss']:.4f} nats a token at step {line['step']}, "
                f"perplexity {line['perplexity']:.2f}"
            )
    return facts


def _sources(folder: DataFolder) -> str:
    count = len(folder.manifest["sources"])
    return "1 source" if count == 1 else f"{count:,} sources"
