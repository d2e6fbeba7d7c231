"""The folder where an output folder NAME is made: .NAME.tmp beside it.

plan.json           what is to be done: the files, the parts, what is known of the manifest
tokenizer.model     a copy of the tokenizer
parts/KEY.json      a part that is done, with its KEY.train.bin, KEY.train.len, ...
data/               the output, until it is moved to its place
"""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from data_prep.files import temporary_name, write_durably
from data_prep.read.sources import is_remote


class Workplace:
    """Where the data set OUTPUT_DIR is made."""

    def __init__(self, output_dir: Path) -> None:
        self.output_dir = output_dir
        self.target = output_dir.resolve()  # a link stays: the folder it points to is made
        if self.target.is_mount():
            raise UserError(f"--output-dir {output_dir} is a mount point: give a folder below it")
        self.folder = self.target.parent / f".{self.target.name}.tmp"
        self.parts = self.folder / "parts"

    @contextlib.contextmanager
    def held(self, *, alone: bool) -> Iterator[None]:
        """Locks the folder: for this run only when `alone`, else together with other ranks.

        Raises:
            UserError: another process is at work there. The system drops the lock of one that died.
        """
        self.parts.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise UserError(f"{self.folder}: another process is making this data set") from None
        except OSError:
            pass  # a file system without locks
        try:
            yield
        finally:
            os.close(descriptor)

    def remove_parts_except(self, keys: set[str]) -> None:
        """Removes the parts of earlier plans, and half-written files of processes that were killed."""
        for path in self.parts.iterdir():
            if path.name.split(".")[0] not in keys or ".tmp-" in path.name:
                path.unlink(missing_ok=True)  # a killed run's last process may be ending itself

    def remove(self) -> None:
        """Removes the folder, and its markers first: if this is killed half-way, no marker stays whose part
        is gone."""
        for marker in self.parts.glob("*.json"):
            marker.unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def remove_what_is_left(self) -> None:
        """Removes the folder of a run that put its output in place and was killed before it had removed
        the folder; unless another process is at work there."""
        if self.folder.is_dir():
            with contextlib.suppress(UserError), self.held(alone=True):
                self.remove()

    def bytes(self) -> int:
        """Of the parts that are done or begun, and of what is joined of them."""
        size = 0
        for path in (*self.parts.glob("*"), *(self.folder / "data").glob("*")):
            with contextlib.suppress(OSError):  # another rank's, renamed meanwhile
                size += path.stat().st_size
        return size

    def read_plan(self) -> dict[str, Any]:
        try:
            return json.loads((self.folder / "plan.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(
                f"{self.output_dir}: nothing to merge, {self.folder} holds no plan.json: run "
                "`megatron-ladder data tokenize ... --rank R --world-size N` first"
            ) from None
        except (OSError, ValueError) as error:
            raise UserError(f"{self.folder / 'plan.json'} cannot be read: {error}") from error

    def agree_on(self, plan: dict[str, Any], tokenizer: Path) -> None:
        """Writes the plan, or finds that the same one is there; several ranks may do this at once.

        Raises:
            UserError: there is another plan: other options, or other files.
        """
        if not (self.folder / "plan.json").is_file():
            self.write_plan(plan, tokenizer)
            return
        other = self.read_plan()
        # Files that are not read may change meanwhile: the ranks' own logs, for example. The limit of bad
        # lines may be raised, so that nothing that was done is lost.
        same = ("left_out", "max_bad_lines")
        keys = [key for key in plan if key not in same and other.get(key) != plan[key]]
        if keys:
            raise UserError(
                f"{self.folder} was begun with other options or other input files "
                f"({_difference(other, plan, keys)}): give all ranks the same, or remove that folder "
                "to start afresh"
            )
        if plan["max_bad_lines"] > other.get("max_bad_lines", plan["max_bad_lines"]):
            self.write_plan({**other, "max_bad_lines": plan["max_bad_lines"]}, tokenizer)

    def write_plan(self, plan: dict[str, Any], tokenizer: Path) -> None:
        name = self.folder / plan["manifest"]["tokenizer"]["file"]
        temporary = temporary_name(name)
        shutil.copyfile(tokenizer, temporary)
        temporary.replace(name)
        write_durably(self.folder / "plan.json", json.dumps(plan) + "\n")


def _difference(other: dict[str, Any], plan: dict[str, Any], keys: list[str]) -> str:
    if "sources" in keys and len(other.get("sources", [])) != len(plan["sources"]):
        return f"{len(other.get('sources', []))} files there, {len(plan['sources'])} now"
    if "sources" in keys:
        for a, b in zip(other["sources"], plan["sources"], strict=True):
            if a != b:
                return f"{a['path']} there, {b['path']} of {b['bytes']:,} bytes now"
    return ", ".join(keys)


def check_outside(output_dir: Path, inputs: Iterable[str]) -> None:
    """Refuses an output folder inside an input folder: the next run would read the output as text."""
    place = output_dir.resolve()
    for given in inputs:
        if not is_remote(given) and Path(given).is_dir() and Path(given).resolve() in place.parents:
            raise UserError(
                f"--output-dir {output_dir} lies in the input folder {given}, where it would be read "
                "as text: choose a folder outside"
            )
