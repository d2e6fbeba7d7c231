"""Exports a run's checkpoint as a Hugging Face folder."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import torch

from megatron_ladder.errors import UserError
from megatron_ladder.hf.export import export_folder
from megatron_ladder.hf.model_config import to_hf_config
from megatron_ladder.hf.output import complete_or_absent
from pretrain.config.train import TrainConfig, load_config
from pretrain.convert.plain_model import one_rank_model
from pretrain.convert.verify_export import verify_export
from pretrain.convert.weights import checkpoint_weights
from pretrain.data.folders import DataFolder, kept_facts, labels
from pretrain.run.folder import checkpoint_step, find_checkpoint
from pretrain.run.metrics import read_metrics

logger = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def export_run(
    run: Path,
    output_dir: Path,
    dtype: str | None,
    max_shard_size: str,
    license: str | None = None,
) -> Path:
    """Writes the newest checkpoint of a run (or the given one) as a Hugging Face folder.

    The folder appears only after its logits were compared with the run's (verify_export.py).

    Args:
        run: the run's folder, or a checkpoint of it.
        output_dir: the folder to make; it is refused when it exists and is not empty.
        dtype: "fp32", "bf16" or "fp16"; None keeps the checkpoint's.
        max_shard_size: the largest size of one safetensors file, such as "5GB".
        license: for the model card, as Hugging Face's hub names it, such as "apache-2.0".

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
    weights = checkpoint_weights(checkpoint)
    hf_config = to_hf_config(model, data.tokenizer["eod_id"])
    tokenizer = data.path / data.tokenizer["file"]
    imported = checkpoint.parents[1] / "imported"
    if imported.is_dir():  # an imported model keeps its own special tokens and tokenizer files
        original = json.loads((imported / "config.json").read_text(encoding="utf-8"))
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(hf_config, name, original.get(name))
        tokenizer = imported
    stored = weights["embedding.word_embeddings.weight"].dtype
    as_dtype = DTYPES[dtype] if dtype else stored
    with complete_or_absent(output_dir) as folder:
        export_folder(
            weights,
            hf_config,
            tokenizer,
            folder,
            max_shard_size=max_shard_size,
            dtype=as_dtype,
            model_card_facts={**_facts(checkpoint, config), "license": license},
        )
        found = verify_export(folder, weights, model, as_dtype)
    logger.info("%s: %s", output_dir, found)
    return output_dir


def _facts(checkpoint: Path, config: TrainConfig) -> dict[str, Any]:
    """The facts for the model card: the run's origin, its data, and its figures at the exported step."""
    step = checkpoint_step(checkpoint)
    run_dir = checkpoint.parents[1]
    facts: dict[str, Any] = {"name": run_dir.resolve().name}
    if (original := run_dir / "imported" / "config.json").is_file():
        facts["origin"] = json.loads(original.read_text(encoding="utf-8"))["architectures"][0]
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
        "Tokens": f"{step * config.tokens_per_step:,}",
        "Sequence length": config.data.seq_length,
        "Global batch size": f"{config.global_batch_size} sequences",
        "Peak learning rate": f"{config.optimizer.lr:g} ({config.schedule.decay})",
        "Precision": config.precision,
        "Tensor-parallel size": config.parallel.tensor_model_parallel_size,
    }
    for line in read_metrics(run_dir):
        # Later lines replace earlier ones, so the last validation up to the step stays.
        if line["kind"] == "validation" and line["step"] <= step:
            training[f"Validation loss ({line['dataset']})"] = (
                f"{line['loss']:.4f} nats a token at step {line['step']}, "
                f"perplexity {line['perplexity']:.2f}"
            )
    return {**facts, "data": data, "training": training}


def _sources(folder: DataFolder) -> str:
    count = len(folder.manifest["sources"])
    return "1 source" if count == 1 else f"{count:,} sources"
