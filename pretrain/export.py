"""From a run's checkpoint to a Hugging Face folder."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_ladder.errors import UserError
from megatron_ladder.hf.export import export_folder
from megatron_ladder.hf.model_config import to_hf_config
from pretrain.config import TrainConfig, load_config
from pretrain.data import kept_facts
from pretrain.metrics import read_metrics
from pretrain.run_folder import checkpoint_step, find_checkpoint
from pretrain.weights import checkpoint_weights

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def export_run(run: Path, output_dir: Path, dtype: str | None, max_shard_size: str) -> Path:
    """Writes the newest checkpoint of a run (or the given one) as a Hugging Face folder.

    Args:
        run: the run's folder, or a checkpoint of it.
        output_dir: made; refused when it holds something.
        dtype: "fp32", "bf16" or "fp16"; None keeps the checkpoint's.
        max_shard_size: of one safetensors file, such as "5GB".

    Raises:
        UserError: no such run or checkpoint, the output is in use, or a size that is none.
    """
    if not re.fullmatch(r"\d+[KMGT]?B", max_shard_size):
        raise UserError(f"--max-shard-size {max_shard_size}: give a size such as 500MB or 5GB")
    checkpoint = find_checkpoint(run)
    config = load_config(checkpoint / "config.json")
    model, tp = config.model, config.parallel.tensor_model_parallel_size
    if model.residual == "desync":
        if tp > 1:
            raise UserError(
                f"{run} was trained with desync-{model.desync_interval} at tensor-parallel size {tp}: "
                "its weights give that model on that many ranks only, and a Hugging Face folder runs "
                "on one. Export a standard, ladder or parallel model"
            )
        model = replace(model, residual="standard")  # one rank parts from nobody
    data = kept_facts(checkpoint.parents[1])[0]
    weights = checkpoint_weights(checkpoint)
    hf_config = to_hf_config(model, data.tokenizer["eod_id"])
    tokenizer = data.path / data.tokenizer["file"]
    imported = checkpoint.parents[1] / "imported"
    if imported.is_dir():  # what another model's configuration and tokenizer say stays so
        original = json.loads((imported / "config.json").read_text(encoding="utf-8"))
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(hf_config, name, original.get(name))
        tokenizer = imported
    stored = weights["embedding.word_embeddings.weight"].dtype
    return export_folder(
        weights,
        hf_config,
        tokenizer,
        output_dir,
        max_shard_size=max_shard_size,
        dtype=DTYPES[dtype] if dtype else stored,
        model_card_facts=_facts(checkpoint, config),
    )


def _facts(checkpoint: Path, config: TrainConfig) -> dict[str, Any]:
    """What the model card says of the run: its data, and figures at the exported step."""
    step = checkpoint_step(checkpoint)
    run_dir = checkpoint.parents[1]
    if not config.data.paths:  # as it was imported
        return {"name": run_dir.name, "data": {}, "training": {}}
    data = {
        path.name: f"{folder.tokens('train'):,} tokens for training"
        for path, folder in zip(config.data.paths, kept_facts(run_dir), strict=True)
    }
    tp, global_batch = config.parallel.tensor_model_parallel_size, config.global_batch_size
    training = {
        "Steps": f"{step:,} of {config.train_steps:,}",
        "Tokens": f"{step * config.tokens_per_step:,}",
        "Sequence length": config.data.seq_length,
        "Global batch size": f"{global_batch} sequences",
        "Peak learning rate": f"{config.optimizer.lr:g} ({config.schedule.decay})",
        "Precision": config.precision,
        "Tensor-parallel size": tp,
    }
    for line in read_metrics(run_dir):
        if line["kind"] == "validation" and line["step"] <= step:  # the last one stays
            training[f"Validation loss ({line['dataset']})"] = (
                f"{line['loss']:.4f} nats a token at step {line['step']}, "
                f"perplexity {line['perplexity']:.2f}"
            )
    return {"name": run_dir.name, "data": data, "training": training}
