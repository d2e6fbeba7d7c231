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
from hypothesis import given, settings
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
_KEPT_KIB = 5  # by hypothesis, of each input that it has drawn for the five tests


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
    allowed = _GROWTH_MIB + _KEPT_KIB * settings().max_examples / 1024
    assert grown < allowed, f"memory grew by {grown:.0f} MiB"


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


def _named(name: str) -> bytes:
    module, _, last = name.rpartition(".")
    return _string(module) + _string(last) + b"\x93"


def _built(name: str, **state: bytes) -> bytes:
    """An object of a class, with these attributes."""
    items = b"".join(_string(key) + value for key, value in state.items())
    return _named(name) + b")\x81}(" + items + b"ub"


# An input is bytes, and each byte is one of these: hypothesis draws bytes faster than anything else.
_SIZE = b"(K\x03K\x02t\x85R"
INSTRUCTIONS = [
    *(bytes([x]) for x in b"(()}]})tsuaebRRNN.0\x81\x85\x85\x86\x86\x87\x88\x89\x93\x94\x94Q"),
    *(b"K" + bytes([x]) for x in (0, 1, 2, 3, 255)),
    *(b"J" + struct.pack("<i", x) for x in (-1, 2**31 - 1, -(2**31))),
    *(b"\x8a\x08" + struct.pack("<q", x) for x in (2**60, -1, 2**63 - 1)),
    *(b"G" + struct.pack(">d", x) for x in (0.5, float("inf"), float("nan"))),
    *(b"h" + bytes([x]) for x in range(12)),
    *(b"q" + bytes([x]) for x in range(12)),
    *map(_named, sorted(indexes._NAMES)),
    *(
        b"c" + x.replace(".", "\n").encode() + b"\n"
        for x in ("os.system", "builtins.eval", "torch.load")
    ),
    *map(
        _string, ("state_dict_metadata", "storage_data", "fqn", "offset", "size", "weight", "../x")
    ),
    _named("torch.Size") + _SIZE,
    _built(indexes._OBJECT),
    _built(indexes._KEY, fqn=_string("weight"), offset=b"N"),
    _built(indexes._PLACE, relative_path=_string("__0_0.distcp"), offset=b"K\0", length=b"K\x20"),
    _built(indexes._CHUNK, offsets=b"K\0\x85", sizes=b"K\3\x85"),
    _built(indexes._METADATA, state_dict_metadata=b"}", storage_data=b"}"),
    _built(indexes._METADATA, state_dict_metadata=b"}", storage_data=b"})"),
    *(bytes([x]) for x in range(0, 256, 16)),
]
assert len(INSTRUCTIONS) < 256


def instructions(picks: bytes) -> bytes:
    return b"".join(INSTRUCTIONS[pick % len(INSTRUCTIONS)] for pick in picks)


PICKLE = st.binary(max_size=40).map(lambda picks: b"\x80\x04" + instructions(picks) + b".")


@given(PICKLE)
def test_pickles_of_random_instructions(checkpoint: Path, content: bytes) -> None:
    read = WATCH.read(lambda: read_pickle(content, indexes._NAMES))
    WATCH.read(lambda: indexes._index(read))


# A change is six bytes: where (two), how many bytes go, and what comes.
CHANGES = st.binary(min_size=6, max_size=24)


def changed(content: bytes, changes: bytes) -> bytes:
    for first in range(0, len(changes) - 5, 6):
        place, (gone, how, *new) = changes[first : first + 2], changes[first + 2 : first + 6]
        at = int.from_bytes(place, "big") % (len(content) + 1)
        comes = instructions(bytes(new[:1])) if how % 3 == 0 else bytes(new)[: how % 3]
        content = content[:at] + comes + content[at + gone % 5 :]
    return content


@given(CHANGES)
def test_an_index_with_random_changes(checkpoint: Path, changes: bytes) -> None:
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
def test_archives_with_random_changes(checkpoint: Path, content: bytes, changes: bytes) -> None:
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
