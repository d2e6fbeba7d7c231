"""Runs tasks of lm-evaluation-harness (the optional package lm-eval) on a model in memory."""

import difflib
import importlib.metadata
import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_ladder.errors import UserError
from pretrain.config.watch import OFFLINE
from pretrain.convert.plain_model import PlainModel, is_hf_folder


def find_tasks(names: Sequence[str], include_path: Path | None) -> Any:
    """lm-eval's TaskManager, after checking that it knows all of `names`. No data is loaded.

    Args:
        names: the names of tasks, groups and tags.
        include_path: a folder with YAML files of more tasks.

    Raises:
        UserError: lm-eval is not installed, or there is no such task or folder.
    """
    if importlib.util.find_spec("lm_eval") is None:
        near = difflib.get_close_matches(names[0], OFFLINE, n=1)
        hint = f"did you mean {near[0]}? Else install" if near else "install"
        raise UserError(
            f"task {names[0]} is none of {', '.join(OFFLINE)}, and lm-evaluation-harness, which has "
            f"more tasks, is not installed: {hint} it with `pip install 'megatron-ladder[eval]'`"
        )
    if include_path is not None and not include_path.is_dir():
        raise UserError(f"--include-path {include_path} is not a folder")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(include_path) if include_path else None)
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, [*OFFLINE, *manager.all_tasks], n=3)
            hint = f": did you mean {' or '.join(near)}?" if near else ""
            raise UserError(f"lm-evaluation-harness has no task {name}{hint}")
    return manager


def wrap(plain: PlainModel, seq_length: int, batch_size: int) -> Any:
    """The model as lm-eval's HFLM.

    The tokenizer of a Hugging Face folder is loaded by transformers; a run's tokenizer is loaded here. The
    model is told which tokens stand before a text. By itself lm-eval would take any BOS token that a
    tokenizer has, also one that training never saw.
    """
    from lm_eval.models.huggingface import HFLM

    begin = plain.text.begin_ids
    if is_hf_folder(plain.path):
        tokenizer = AutoTokenizer.from_pretrained(plain.path, trust_remote_code=False)
    else:
        own = plain.text.tokenizer
        names = {"eos_token": own.id_to_token(plain.tokenizer["eod_id"])}
        if begin:
            names["bos_token"] = own.id_to_token(begin[0])
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, **names)
    plain.model.generation_config.eos_token_id = list(plain.text.end_ids)
    return HFLM(
        pretrained=plain.model,
        tokenizer=tokenizer,
        max_length=seq_length,
        batch_size=batch_size,
        add_bos_token=bool(begin),
        prefix_token_id=(begin or [plain.tokenizer["eod_id"]])[-1],
    )


def run_harness_task(name: str, manager: Any, lm: Any, limit: int | None) -> list[dict[str, Any]]:
    """Runs a task, or all tasks of a group or tag, and returns one result for each.

    Raises:
        UserError: the task's data could not be loaded, for whatever reason.
    """
    from lm_eval import simple_evaluate

    try:
        manager.load([name])
    except Exception as error:  # from datasets, from the hub's client, or from the task's own code
        said = next(iter(str(error).splitlines()), "")
        raise UserError(
            f"task {name}: its data could not be loaded: {type(error).__name__}: {said}"
        ) from error
    found = simple_evaluate(
        model=lm, tasks=[name], task_manager=manager, limit=limit, log_samples=False
    )
    version = importlib.metadata.version("lm-eval")
    return [
        {
            "task": task,
            "metrics": {k: v for k, v in metrics.items() if isinstance(v, int | float)},
            "items": found["n-samples"].get(task, {}).get("effective"),
            "lm_eval": version,
        }
        for task, metrics in found["results"].items()
    ]
