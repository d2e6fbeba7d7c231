"""What each rank asks the file system for at a start: bounds that hold for any number of data sets.

A thousand nodes share the file system, so what every rank does is done thousands of times.
"""

from pathlib import Path
from typing import Any

import pytest

from commands.opens import back_to_the_first_step, make_data_set, started

SETS = 5
A_RUN = (
    30  # the reader of checkpoints looks at each file before it opens it: no link out of the folder
)
"""Opens, or stats, that any rank may do in the run's folder: it reads the checkpoint, maps the blend."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data sets, and a finished run: its index files are made."""
    place = tmp_path_factory.mktemp("opens")
    for number in range(SETS):
        make_data_set(place / "sets" / f"set{number}", number)
    started(place, SETS, 1, 400)
    return place


def test_a_start_of_two_tensor_parallel_ranks(place: Path) -> None:
    back_to_the_first_step(place / "run")
    first, second = started(place, SETS, 2, 400)
    ours: dict[str, Any] = first["to_first_step"]["data"]
    # The first rank checks (manifest, .idx; is there, and how large?), keeps manifest and tokenizer,
    # reads the validation split's tokens once, and opens tokens and .idx.
    assert ours["opens"] <= 8 * SETS
    assert ours["stats"] <= 12 * SETS
    assert first["descriptors"] <= 6 * SETS
    # The other gets its batches from the first.
    for until in ("to_first_step", "to_end"):
        assert set(second[until]["data"].values()) == {0}
    assert second["descriptors"] <= 0
    assert second["to_first_step"]["run"]["opens"] <= A_RUN
    assert second["to_first_step"]["run"]["stats"] <= A_RUN


def test_a_rank_that_reads_opens_two_files_of_a_data_set(place: Path) -> None:
    back_to_the_first_step(place / "run")
    ranks = started(place, SETS, 4, 400)
    reading = [2]  # of two tensor-parallel ranks the first; both stages need tokens
    for number, rank in list(enumerate(ranks))[1:]:
        found = rank["to_first_step"]
        assert found["data"]["opens"] == (2 * SETS if number in reading else 0)
        assert found["data"]["stats"] == 0
        assert found["run"]["opens"] <= A_RUN
        assert found["run"]["stats"] <= A_RUN
        assert rank["descriptors"] <= 3 * SETS + 2  # and the order of the blend


def test_a_finished_run_s_checkpoint_is_read_once(place: Path) -> None:
    last = place / "run" / "checkpoints" / "step_00000002"
    files = [path for path in last.iterdir() if path.name != "manifest.json"]
    assert last.is_dir()
    ranks = started(place, SETS, 2, 400)
    assert not any("to_first_step" in rank for rank in ranks)  # nothing to do
    opens = [rank["to_end"]["run"]["opens"] for rank in ranks]
    assert opens[1] <= len(files) // 2 + 1  # its share, and the manifest
    assert ranks[1]["to_end"]["data"]["opens"] == 0
    shard = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[-1000] ^= 1
    shard.write_bytes(content)
    ranks = started(place, SETS, 2, 400)
    assert all("to_first_step" in rank for rank in ranks)  # set aside, and trained again
    assert last.with_name("step_00000002.damaged").is_dir()
    assert last.is_dir()
