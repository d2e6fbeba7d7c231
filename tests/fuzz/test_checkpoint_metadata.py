"""A checkpoint's files with anything in them: refused as `NotData`, or read; nothing runs, nothing grows.

Inputs: pickles of random instructions, a real index and real archives with random changes, random JSON.
"""

import contextlib
import io
import json
import pickle
import resource
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ladder.reading import index as indexes
from megatron_ladder.reading.contents import check_format
from megatron_ladder.reading.pickles import read_pickle
from megatron_ladder.reading.plain_files import NotData
from megatron_ladder.reading.saved import read_saved
from megatron_ladder.reading.tensors import with_tensors
from pretrain.run.checkpoint_files import damage
from tests.checkpoints import STATES, WEIGHT, write_checkpoint
from tests.hostile import torch_saved

# What Python reports when code of a pickle is found, imported or run.
_RUNS = {
    "pickle.find_class",
    "import",
    "exec",
    "compile",
    "os.system",
    "os.exec",
    "subprocess.Popen",
}
_GROWTH_MIB = 300


class Watch:
    """Notes the events of `_RUNS` while it is on. Python cannot remove such a hook: there is one."""

    def __init__(self) -> None:
        self.on, self.seen = False, list[str]()
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.on and event in _RUNS:
            self.seen.append(f"{event} {str(arguments)[:100]}")

    def read(self, read: Callable[[], Any]) -> Any:
        """What `read` returns; None when it refuses."""
        self.on = True
        said = ""
        try:
            return read()
        except NotData as refused:
            said = str(refused)
            return None
        finally:
            self.on = False
            assert not self.seen, self.seen
            assert len(said) < 600


WATCH = Watch()


@pytest.fixture(scope="module", autouse=True)
def memory() -> Iterator[None]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < _GROWTH_MIB, f"memory grew by {grown:.0f} MiB"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_checkpoint(tmp_path_factory.mktemp("run") / "checkpoint")
    WATCH.read(lambda: indexes.read_index(folder))  # imports what it needs
    content = torch_saved(STATES)
    WATCH.read(lambda: opened_and_read(content))
    WATCH.seen.clear()
    return folder


def opened_and_read(content: bytes) -> Any:
    file: Any = io.BufferedReader(io.BytesIO(content))
    return with_tensors(read_saved(file, 0, len(content)), file)


def _string(text: str) -> bytes:
    return b"\x8c" + bytes([len(text)]) + text.encode()


NAMES = sorted(indexes._NAMES)
NUMBER = st.one_of(
    st.binary(min_size=1, max_size=1).map(lambda x: b"K" + x),
    st.binary(min_size=4, max_size=4).map(lambda x: b"J" + x),
    st.binary(min_size=8, max_size=8).map(lambda x: b"\x8a\x08" + x),
    st.floats().map(lambda x: b"G" + struct.pack(">d", x)),
)
MEMORY = st.integers(0, 20)
INSTRUCTION = st.one_of(
    st.sampled_from(
        [bytes([x]) for x in b"(()}]})tsuaebR.N0\x81\x85\x86\x87\x88\x89\x93\x94\x94Q"]
    ),
    NUMBER,
    MEMORY.map(lambda x: b"h" + bytes([x])),
    MEMORY.map(lambda x: b"q" + bytes([x])),
    st.sampled_from(NAMES).map(
        lambda x: _string(x.rpartition(".")[0]) + _string(x.rpartition(".")[2]) + b"\x93"
    ),
    st.sampled_from(["os.system", "builtins.eval", "builtins.getattr", "torch.load"]).map(
        lambda x: (
            b"c" + x.rpartition(".")[0].encode() + b"\n" + x.rpartition(".")[2].encode() + b"\n"
        )
    ),
    st.sampled_from(["state_dict_metadata", "storage_data", "fqn", "offset", "size", "chunks"]).map(
        _string
    ),
    st.binary(max_size=6),
)
PICKLE = st.lists(INSTRUCTION, max_size=40).map(lambda x: b"\x80\x04" + b"".join(x) + b".")


@given(PICKLE)
def test_pickles_of_random_instructions(checkpoint: Path, content: bytes) -> None:
    read = WATCH.read(lambda: read_pickle(content, indexes._NAMES))
    WATCH.read(lambda: indexes._index(read))


# A change: where, how many bytes go, and what comes.
CHANGE = st.tuples(
    st.integers(0, 2**16),
    st.integers(0, 4),
    st.one_of(st.binary(max_size=4), INSTRUCTION, st.sampled_from([b"", b"\xff" * 8, b"\0" * 4])),
)
CHANGES = st.lists(CHANGE, min_size=1, max_size=4)


def changed(content: bytes, changes: list[tuple[int, int, bytes]]) -> bytes:
    for where, gone, new in changes:
        at = where % (len(content) + 1)
        content = content[:at] + new + content[at + gone :]
    return content


@given(CHANGES)
def test_an_index_with_random_changes(
    checkpoint: Path, changes: list[tuple[int, int, bytes]]
) -> None:
    content = changed(_content(checkpoint / ".metadata"), changes)
    read = WATCH.read(lambda: indexes._index(read_pickle(content, indexes._NAMES)))
    if read is None:
        return
    with contextlib.suppress(OSError):  # it names another file, which is not there
        WATCH.read(lambda: indexes.check_files(read, checkpoint))
    for tensor in read.tensors.values():  # what a reader would allocate is in the files
        stored = sum(chunk.place.length for chunk in tensor.chunks if chunk.place)
        assert indexes.count(tensor.shape) <= stored


_READ: dict[Path, bytes] = {}


def _content(file: Path) -> bytes:
    if file not in _READ:
        _READ[file] = file.read_bytes()
    return _READ[file]


ARCHIVES = [torch_saved(value) for value in (WEIGHT, STATES, {"step": 3, "losses": [1.5, 2.5]})]


@given(st.sampled_from(ARCHIVES), CHANGES)
def test_archives_with_random_changes(
    checkpoint: Path, content: bytes, changes: list[tuple[int, int, bytes]]
) -> None:
    made = changed(content, changes)
    WATCH.read(lambda: opened_and_read(made))


@given(PICKLE)
def test_archives_of_random_pickles(checkpoint: Path, content: bytes) -> None:
    """The pickle in an archive, in place of one of the same length."""
    archive = torch_saved(b"\xff" * len(content))
    begin = archive.find(b"\x80\x02")
    WATCH.read(lambda: opened_and_read(archive[:begin] + content + archive[begin + len(content) :]))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["files", "bytes", "sha256", "sharded_backend", "..", "/dev/zero", "a"]
            ),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)


@given(st.one_of(JSON.map(lambda x: json.dumps(x).encode()), st.binary(max_size=30)), st.booleans())
def test_random_json(checkpoint: Path, content: bytes, is_manifest: bool) -> None:
    file = checkpoint / ("manifest.json" if is_manifest else "metadata.json")
    before = None if is_manifest else _content(file)
    file.write_bytes(content)
    if is_manifest:
        assert isinstance(WATCH.read(lambda: damage(checkpoint, read=True)), str)
        file.unlink()
    else:
        WATCH.read(lambda: check_format(checkpoint))
        file.write_bytes(before or b"")


def test_what_python_does_with_such_a_pickle_is_noticed() -> None:
    """The watch itself."""
    content = b"\x80\x02cbuiltins\nlen\nX\x03\x00\x00\x00abc\x85R."
    WATCH.on = True
    assert pickle.loads(content) == 3  # noqa: S301
    WATCH.on = False
    assert WATCH.seen
    WATCH.seen.clear()
