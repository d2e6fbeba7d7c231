"""`megatron-ladder eval`: measures a model on data sets and on tasks."""

import functools
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_ladder.errors import UserError
from pretrain.convert.plain_model import PlainModel, is_hf_folder, load_plain_model
from pretrain.data.folders import open_folder
from pretrain.data.sample import check_tokenizer
from pretrain.evaluation import harness
from pretrain.evaluation.documents import Documents, Texts, open_split
from pretrain.evaluation.likelihood import TextModel
from pretrain.evaluation.needle import ITEMS as NEEDLES
from pretrain.evaluation.needle import Haystack, run_needle
from pretrain.evaluation.offline_tasks import ITEMS, run_task
from pretrain.evaluation.options import EvalOptions
from pretrain.evaluation.perplexity import measure_perplexity
from pretrain.evaluation.refine import check_scorer, run_refine
from pretrain.evaluation.results import Result, curve, grid, new_file, save, table
from pretrain.run.folder import EVALUATIONS, checkpoint_step, find_checkpoint
from pretrain.run.versions import versions

logger = logging.getLogger(__name__)


def evaluate(options: EvalOptions) -> Path:
    """Measures the model, prints a table, and writes a file of results, again after each result.

    Returns:
        The path of the file.

    Raises:
        UserError: before any measurement, when options, model and data do not fit together; at the end,
            when a task failed, such as one of lm-evaluation-harness whose data could not be loaded.
    """
    if "refine" in options.offline_tasks():
        check_scorer()
    splits = [open_split(open_folder(path), options.split) for path in options.data_paths()]
    names = options.harness_tasks()
    manager = harness.find_tasks(names, options.include_path) if names else None
    plain = load_plain_model(options.model)
    seq_length = _seq_length(options, plain)
    # They use the data's own ids.
    if {"perplexity", "needle", "refine"}.intersection(options.offline_tasks()):
        for documents in splits:
            check_tokenizer(documents.folder, plain.tokenizer_file, plain.path)
    folder, step = _place(options)
    file = new_file(options.output_dir or folder, step)

    facts = _facts(plain, step)
    results: list[Result] = []
    failed = []
    for measure in _measurements(options, plain, splits, seq_length, manager):
        try:
            results += measure()
        except UserError as error:  # one task failed, such as by data that cannot be loaded
            failed.append(str(error))
        else:
            save(file, facts, results)
    if results:
        print(f"{_report(results)}\n\nResults: {file}")
    if failed:
        raise UserError("\n".join(failed))
    return file


def _seq_length(options: EvalOptions, plain: PlainModel) -> int:
    context = plain.config.max_position_embeddings
    if options.seq_length is not None and options.seq_length > context:
        # Allowed: it shows what an extension of the context is for.
        logger.warning(
            "--seq-length %d is beyond the context of %s, %d tokens: the model was not trained on such "
            "positions",
            *(options.seq_length, plain.path, context),
        )
    return options.seq_length or context


def _place(options: EvalOptions) -> tuple[Path, int | None]:
    """The folder that results go to without --output-dir, and the checkpoint's step (None: not a run)."""
    if is_hf_folder(options.model):  # beside the model, since everything in its folder is published
        folder = options.model.resolve()
        return folder.with_name(f"{folder.name}-{EVALUATIONS}"), None
    checkpoint = find_checkpoint(options.model)
    return checkpoint.parents[1] / EVALUATIONS, checkpoint_step(checkpoint)


def _facts(plain: PlainModel, step: int | None) -> dict[str, Any]:
    on_gpu = plain.device.type == "cuda"
    return {
        "model": plain.name,
        "path": str(plain.path),
        "step": step,
        "residual": plain.config.residual,
        "tokenizer_sha256": plain.tokenizer["sha256"],
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "dtype": str(plain.model.dtype).removeprefix("torch."),
        "versions": versions(),
        "unix_time": time.time(),
    }


def _measurements(
    options: EvalOptions,
    plain: PlainModel,
    splits: list[Documents],
    seq_length: int,
    manager: Any,
) -> Iterator[Callable[[], list[Result]]]:
    """The measurements that the options ask for, as functions to call one after another."""
    batch_size, seed = options.batch_size, options.seed
    begin = plain.text.begin_ids or [plain.tokenizer["eod_id"]]
    text_model = TextModel(plain.model, plain.text.tokenizer, begin, seq_length, batch_size)

    def perplexity(documents: Documents) -> Result:
        if options.max_tokens is not None:
            documents = documents.at_most(options.max_tokens, seed)
        found = measure_perplexity(plain.model, documents, seq_length, batch_size)
        return found | {"seed": None if documents.is_whole else seed}

    def offline(name: str, documents: Documents) -> list[Result]:
        if name == "perplexity":
            found = perplexity(documents)
        elif name == "needle":
            haystack = Haystack(documents, plain.text.tokenizer, begin)
            count = options.limit or NEEDLES
            found = run_needle(plain.model, haystack, seq_length, count, seed, batch_size)
        elif name == "refine":
            how = (seq_length, options.limit, seed, batch_size)
            found = run_refine(plain.model, plain.text, documents, *how)
        else:
            count = options.limit or ITEMS
            found = run_task(name, Texts(documents), count, seed, text_model.likelihoods)
        made_with = documents.folder.tokenizer["sha256"]
        data = {"data": documents.folder.name, "split": documents.split}
        return [found | data | {"data_tokenizer_sha256": made_with}]

    for documents in splits:
        for name in options.offline_tasks():
            yield functools.partial(offline, name, documents)
    if options.harness_tasks():
        lm = harness.wrap(plain, seq_length, batch_size)
        for name in options.harness_tasks():
            yield functools.partial(harness.run_harness_task, name, manager, lm, options.limit)


def _report(results: list[Result]) -> str:
    """The table of results, what perplexity was measured on, and the first item of each task, as text."""
    parts = [table(results)]
    for result in results:
        if result["task"] == "perplexity":
            drawn = "the whole split" if result["is_whole_split"] else "drawn at random"
            parts.append(
                f"{result['data']} {result['split']}: {result['documents']:,} documents ({drawn}), "
                f"{result['text_bytes']:,} bytes, in windows of {result['seq_length']:,} tokens; "
                f"{result['tokens_per_second']:,.0f} tokens a second\n"
                f"loss by the number of tokens before: {curve(result)}"
            )
        elif result["task"] == "needle":
            parts.append(f"needle, accuracy by depth and length of the prompt:\n{grid(result)}")
        elif result["task"] == "refine":
            one = result["examples"][0]
            parts.append(
                f"refine, the first item: {one['prompt']!r} -> {one['written']!r}, reference "
                f"{one['reference']!r}"
            )
        elif "example" in result:
            example = result["example"]
            answer = example["choices"][example["answer"]]
            wrong = [c for c in example["choices"] if c is not answer]
            parts.append(
                f"{result['task']}, the first item: ...{example['context'][-200:]!r} -> {answer!r}"
                + "".join(f"\n    not {choice!r}" for choice in wrong)
            )
    return "\n\n".join(parts)
