"""The rows of a benchmark: one for each case, or a few."""

import argparse
import contextlib
import gc
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from measuring import facts
from pretrain.ranks import is_first_rank


class Rows(list[dict[str, Any]]):
    """What has been measured so far. The JSON is written anew after each case."""

    def __init__(self, device: str, args: argparse.Namespace) -> None:
        super().__init__()
        self._device, self._args = device, args
        self.besides: dict[str, Any] = {}
        """Fields of the JSON beside the rows."""

    @contextlib.contextmanager
    def case(self, **labels: str) -> Iterator[None]:
        """Rows of one case are added inside. If it fails, its row has the reason, and the others can still
        be measured. Its peak of memory is counted from its start."""
        gc.collect()  # here, as an error of the case before holds what that had allocated
        torch.cuda.empty_cache()
        facts.forget_peak()
        try:
            yield
        except (RuntimeError, ImportError) as error:
            self.append({**labels, "error": facts.reason(error)})
        if is_first_rank():
            said = self[-1].get("error") or facts.in_words(self[-1])
            print(f"{', '.join(labels.values())}: {said}", flush=True)
            header = facts.header(self._device, self._args)
            facts.write(self._args.json, {**header, "rows": self, **self.besides})

    def end(self, table: str) -> NoReturn:
        """Prints the table and exits, with status 1 if a case failed for another reason than memory."""
        if is_first_rank():
            print(table)
        if dist.is_initialized():
            dist.destroy_process_group()
        errors = [row["error"] for row in self if "error" in row]
        sys.exit(any(not error.startswith(facts.NO_MEMORY) for error in errors))
