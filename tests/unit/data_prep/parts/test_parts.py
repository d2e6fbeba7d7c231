"""However the work is cut, shared out or interrupted, the same bytes come out."""

import functools
import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import cli
from data_prep.errors import UserError
from data_prep.parts import plan
from data_prep.parts.plan import check_tiling, from_json, plan_parts, to_json
from data_prep.read.sources import Segment, Source, find_sources
from data_prep.read.zstd import zstd_frames

OPTIONS = ("--validation-fraction", "0.2")


def run(source: object, tokenizer: Path, out: Path, *options: object) -> dict[str, bytes]:
    """The data set's token files."""
    argv = ["tokenize", source, "--tokenizer", tokenizer, "--output-dir", out, *OPTIONS, *options]
    assert cli.main([str(a) for a in argv]) == 0
    return content(out)


def content(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in out.iterdir() if p.suffix in (".bin", ".idx")}


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "SMALLEST_BYTES", 3000)


@pytest.fixture
def expected(jsonl: Path, tokenizer: Path, tmp_path: Path) -> dict[str, bytes]:
    """By the reference engine, in one piece."""
    return run(jsonl, tokenizer, tmp_path / "expected", "--engine", "reference")


def test_workers_ranks_and_engines_do_not_change_the_output(
    jsonl, tokenizer, expected, small_parts, tmp_path, capsys
) -> None:
    assert len(plan_parts(find_sources((jsonl,)), "file")) > 5
    assert run(jsonl, tokenizer, tmp_path / "one", "--workers", 1) == expected
    assert run(jsonl, tokenizer, tmp_path / "three", "--workers", 3) == expected
    out = tmp_path / "array"
    for rank in (2, 0, 1):  # tasks of an array end in any order
        argv = ["tokenize", jsonl, "--tokenizer", tokenizer, "--output-dir", out, *OPTIONS]
        argv += ["--rank", rank, "--world-size", 3, "--workers", 1]
        assert cli.main([str(a) for a in argv]) == 0
        assert not out.exists()
    assert cli.main(["merge", str(out)]) == 0
    assert content(out) == expected
    assert not (tmp_path / ".array.tmp").exists()
    capsys.readouterr()
    assert cli.main(["merge", str(out)]) == 0
    assert "merged before" in capsys.readouterr().out


def test_compressed_and_columnar_inputs_are_cut_too(
    texts, jsonl, tokenizer, expected, small_parts, tmp_path
) -> None:
    raw = jsonl.read_bytes()
    step = len(raw) // 37  # frames end anywhere in a line
    pieces = [raw[i : i + step] for i in range(0, len(raw), step)]
    skippable = (
        (0x184D2A53).to_bytes(4, "little") + (5).to_bytes(4, "little") + b"\x28\xb5\x2f\xfd!"
    )
    packed = tmp_path / "a.jsonl.zst"
    packed.write_bytes(b"".join(zstandard.compress(p, 1) + skippable for p in pieces))
    assert len(zstd_frames(str(packed))) == len(pieces)
    packed_long = tmp_path / "long.jsonl.zst"
    parameters = zstandard.ZstdCompressionParameters(window_log=30, write_checksum=True)
    packed_long.write_bytes(zstandard.ZstdCompressor(compression_params=parameters).compress(raw))
    gz = tmp_path / "a.jsonl.gz"
    gz.write_bytes(gzip.compress(raw[:5000]) + gzip.compress(raw[5000:]))
    table = pa.table(
        {"id": list(range(len(texts))), "text": texts, "meta": [{"body": t} for t in texts]}
    )
    parquet = tmp_path / "a.parquet"
    pq.write_table(table, parquet, row_group_size=17)
    saved = tmp_path / "saved"
    saved.mkdir()
    names = []
    for number, start in enumerate(range(0, len(texts), 90)):
        names.append(f"data-{number:05}-of-00003.arrow")
        with (
            pa.OSFile(str(saved / names[-1]), "wb") as file,
            pa.ipc.new_stream(file, table.schema) as stream,
        ):
            stream.write_table(table.slice(start, 90), max_chunksize=40)
    (saved / "state.json").write_text(json.dumps({"_data_files": [{"filename": n} for n in names]}))
    (saved / "dataset_info.json").write_text("{}")
    (tmp_path / "shards").mkdir()
    lines = raw.splitlines(True)
    for number, start in enumerate(range(0, len(lines), 50)):
        (tmp_path / "shards" / f"{number}.jsonl").write_bytes(b"".join(lines[start : start + 50]))
    for number, (source, options) in enumerate(
        [
            (packed, ()),
            (packed_long, ()),
            (gz, ()),
            (parquet, ()),
            (parquet, ("--text-field", "meta.body")),
            (saved, ()),
            (f"{tmp_path}/shards/*.jsonl", ()),
        ]
    ):
        out = tmp_path / f"out{number}"
        assert run(source, tokenizer, out, "--workers", 1, *options) == expected, source
    assert len(plan_parts(find_sources((packed,)), "file")) > 2
    assert len(plan_parts(find_sources((parquet,)), "file")) > 2


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=12), st.integers(1, 1500))
@settings(max_examples=100, deadline=None)
def test_parts_tile_the_input(sizes: list[int], size: int) -> None:
    sources = [Source(f"{i}.jsonl", "jsonl", None, n, "") for i, n in enumerate(sizes)]
    planned = plan_parts(sources, "file", size)
    check_tiling(planned)
    assert from_json(json.loads(json.dumps(to_json(planned, sources))), sources) == planned
    assert sum(part.bytes for part in planned) == sum(sizes)
    segments = [s for part in planned for s in part.segments]
    assert [s.source for s in segments if not s.begin] == sources


def test_holes_and_overlaps_are_refused() -> None:
    source = Source("a.jsonl", "jsonl", None, 100, "")

    def tiled(*ranges: tuple[int, int | None]) -> None:
        check_tiling([plan.Part(i, (Segment(source, 0, *r),)) for i, r in enumerate(ranges)])

    tiled((0, 50), (50, None))
    with pytest.raises(UserError, match="left out between 40 and 50"):
        tiled((0, 40), (50, None))
    with pytest.raises(UserError, match="taken twice between 60 and 50"):
        tiled((0, 60), (50, None))
    with pytest.raises(UserError, match="left out up to 10"):
        tiled((10, None))
    with pytest.raises(UserError, match="left out from 50 on"):
        tiled((0, 50))


def test_merging_what_is_not_whole(jsonl, tokenizer, small_parts, tmp_path, refused) -> None:
    assert "nothing to merge" in refused("merge", tmp_path / "no")
    out = tmp_path / "data"
    base = ["tokenize", jsonl, "--tokenizer", tokenizer, "--output-dir", out, *OPTIONS]
    base += ["--world-size", 2, "--workers", 1]
    assert cli.main([str(a) for a in [*base, "--rank", 0]]) == 0
    assert "parts are not done: 1, 3, 5" in refused("merge", out)
    other = refused(*base, "--rank", 1, "--test-fraction", 0.1)
    assert "begun with other options or other input files" in other
    assert cli.main([str(a) for a in [*base, "--rank", 1]]) == 0
    damaged = sorted((tmp_path / ".data.tmp" / "parts").glob("*.train.bin"))[0]
    kept = damaged.read_bytes()
    damaged.write_bytes(kept[:-2])
    assert "1 of" in refused("merge", out)
    damaged.write_bytes(kept)
    assert cli.main(["merge", str(out)]) == 0


def test_ranks_are_checked(jsonl, tokenizer, tmp_path, refused) -> None:
    base = ["tokenize", jsonl, "--tokenizer", tokenizer, "--output-dir", tmp_path / "new"]
    assert "needs --rank" in refused(*base, "--world-size", 2)
    assert "ranks count from 0" in refused(*base, "--world-size", 2, "--rank", 2)


def test_a_run_that_is_killed_anywhere_goes_on(jsonl, tokenizer, tmp_path) -> None:
    """SIGKILL of the parent, or of one of its processes, at ten random moments."""
    big = tmp_path / "big.jsonl"
    lines = jsonl.read_bytes().splitlines(True)
    chance = random.Random(5)
    with big.open("wb") as file:
        for _ in range(400):
            file.writelines(chance.sample(lines, len(lines)))
    expected = run(big, tokenizer, tmp_path / "expected", "--engine", "reference", "--workers", 2)
    out = tmp_path / "data"
    code = (
        "import sys; from data_prep import cli; from data_prep.parts import plan; "
        "plan.SMALLEST_BYTES = 400_000; "
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    argv = ["tokenize", big, "--tokenizer", tokenizer, "--output-dir", out, *OPTIONS]
    command = [sys.executable, "-c", code, *map(str, argv), "--workers", "2"]
    kills = killed_processes = 0
    while kills < 10 or not killed_processes:
        said = tmp_path / "said"
        with said.open("wb") as file:
            process = subprocess.Popen(command, stdout=file, stderr=file)
        time.sleep(chance.uniform(0.2, 2.5))
        if process.poll() is not None:
            assert process.returncode == 0, said.read_text()
            assert content(out) == expected
            for path in sorted(out.iterdir()):
                path.unlink()
            out.rmdir()
            continue
        victims = children(process.pid)
        if victims and chance.random() < 0.4:
            os.kill(chance.choice(victims), signal.SIGKILL)
            killed_processes += 1
            process.wait(60)
            if process.returncode == 0:  # it had nothing left to do
                continue
        else:
            process.kill()
            process.wait(60)
        kills += 1
        assert not out.exists() or content(out) == expected
    if not out.exists():
        subprocess.run(command, check=True, timeout=120, stdout=subprocess.DEVNULL)
    assert content(out) == expected
    assert not (tmp_path / ".data.tmp").exists()


def test_a_run_that_is_killed_in_clearing_up(jsonl, tokenizer, tmp_path, monkeypatch) -> None:
    """The data set was in its place by then; who deletes it and starts again gets it once more."""
    expected = run(jsonl, tokenizer, tmp_path / "expected")
    out = tmp_path / "data"

    def killed(folder: Path, **_: object) -> None:
        if (tokens := sorted(folder.glob("parts/*.bin"))) and out.is_dir():
            tokens[0].unlink()
            raise KeyboardInterrupt

    def run_and_kill() -> None:
        with monkeypatch.context() as patch:
            patch.setattr("data_prep.parts.workplace.shutil.rmtree", killed)
            argv = ["tokenize", jsonl, "--tokenizer", tokenizer, "--output-dir", out, *OPTIONS]
            assert cli.main([str(argument) for argument in argv]) == 130
        assert (tmp_path / ".data.tmp/parts").is_dir()

    run_and_kill()
    shutil.rmtree(out)
    assert run(jsonl, tokenizer, out) == expected

    shutil.rmtree(out)
    run_and_kill()
    assert run(jsonl, tokenizer, out) == expected  # done: what was left goes
    assert not (tmp_path / ".data.tmp").exists()


def children(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    try:
        return [int(child) for child in path.read_text().split()]
    except OSError:
        return []


def test_processes_end_with_their_parent(jsonl, tokenizer, tmp_path) -> None:
    big = tmp_path / "big.jsonl"
    big.write_bytes(jsonl.read_bytes() * 2000)
    argv = ["tokenize", big, "--tokenizer", tokenizer, "--output-dir", tmp_path / "data"]
    command = [sys.executable, "-m", "data_prep", *map(str, argv), "--workers", "2"]
    process = subprocess.Popen([*command, "--engine", "reference"])
    deadline = time.monotonic() + 60
    while len(started := children(process.pid)) < 3:  # two, and Python's own tracker
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(1)
    process.kill()
    process.wait(60)
    while any(Path(f"/proc/{pid}").exists() for pid in started):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_control_c_ends_all_at_once_and_keeps_what_is_done(jsonl, tokenizer, tmp_path) -> None:
    big = tmp_path / "big.jsonl"
    big.write_bytes(jsonl.read_bytes() * 4000)
    argv = ["tokenize", big, "--tokenizer", tokenizer, "--output-dir", tmp_path / "data"]
    command = [sys.executable, "-m", "data_prep", *map(str, argv), "--workers", "2"]
    process = subprocess.Popen(
        [*command, "--engine", "reference"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # Ignored in what a shell has started in the background, these tests perhaps.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while len(children(process.pid)) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(1.5)
    begin = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in output and "Traceback" not in output, output
    assert time.monotonic() - begin < 20


def test_ten_million_documents_are_joined_in_little_memory(tmp_path) -> None:
    """Lengths of ten million documents, in three files: 40 MB, their index 200 MB."""
    lengths = np.random.default_rng(0).integers(1, 30, 10_000_000).astype("<i4")
    for i, some in enumerate(np.split(lengths, [3_000_000, 3_000_001])):
        some.tofile(tmp_path / f"{i}.len")
    half, odd = divmod(int(lengths.sum()), 2)
    for i, size in enumerate([half + odd, half]):
        np.zeros(size, "<u2").tofile(tmp_path / f"{i}.bin")
    # The peak of a process that does nothing else: getrusage would count what this one has held, too.
    code = """
import sys
from pathlib import Path
from data_prep.parts.pool import peak_memory
from data_prep.dataset.shards import append_files, write_index
folder = Path(sys.argv[1])
base = peak_memory()
append_files(folder / "train.bin", [folder / f"{i}.bin" for i in range(2)])
write_index(folder / "train.idx", "uint16", [folder / f"{i}.len" for i in range(3)])
print(peak_memory() - base)
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=200)
    assert int(done.stdout) < 100e6
    index = np.memmap(tmp_path / "train.idx", np.uint8, "r")
    assert len(index) == 34 + 10_000_000 * 20 + 8
    lengths = index[34 : 34 + 40_000_000].view("<i4")
    offsets = index[34 + 40_000_000 : 34 + 120_000_000].view("<i8")
    assert offsets[-1] + 2 * int(lengths[-1]) == (tmp_path / "train.bin").stat().st_size
    assert int(index[-8:].view("<i8")[0]) == 10_000_000


def test_a_run_that_is_begun_anew_with_other_options_takes_nothing_over(
    jsonl, tokenizer, small_parts, tmp_path, monkeypatch
) -> None:
    from data_prep.dataset import tokenize as tokenize_text

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tokenize_text, "join", stop)
        argv = ["tokenize", jsonl, "--tokenizer", tokenizer, "--output-dir", tmp_path / "data"]
        assert cli.main([str(a) for a in [*argv, "--workers", 1]]) == 130
    old = {p.name for p in (tmp_path / ".data.tmp" / "parts").iterdir()}
    assert old
    found = run(jsonl, tokenizer, tmp_path / "data", "--workers", 1, "--test-fraction", 0.1)
    assert found == run(
        jsonl, tokenizer, tmp_path / "fresh", "--test-fraction", 0.1, "--engine", "reference"
    )
