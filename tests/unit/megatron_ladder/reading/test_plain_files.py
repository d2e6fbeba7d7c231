"""Files of a stranger's folder: no pipe is opened, and no link is followed out of it."""

import os
from pathlib import Path

import pytest

from megatron_ladder.reading.plain_files import NotData, open_plain, plain_size, refuse_links


@pytest.mark.parametrize("name", ["..", "a/b", "a\0b", "\ud800", ""])
def test_names_that_no_file_has(name: str, tmp_path: Path) -> None:
    with pytest.raises(NotData, match="is not the name of a file"):
        plain_size(tmp_path, name)


def test_links_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("a")
    with pytest.raises(OSError, match="symbolic links"):
        open_plain(tmp_path, "a")
    refuse_links(tmp_path)  # it is no file, so it is not copied


def test_what_is_copied_is_of_the_folder(tmp_path: Path) -> None:
    private = tmp_path / "private"
    private.mkdir()
    (private / "config.json").write_text("{}")
    run = tmp_path / "run"
    run.mkdir()
    (run / "imported").symlink_to(private)
    with pytest.raises(NotData, match="outside of"):
        refuse_links(run / "imported", home=run)
    (run / "imported").unlink()
    (run / "imported").mkdir()
    (run / "imported" / "a.json").symlink_to(private / "config.json")
    with pytest.raises(NotData, match=r"a\.json is a link"):
        refuse_links(run / "imported", home=run)
    (run / "imported" / "a.json").unlink()
    os.mkfifo(run / "imported" / "a.json")
    with pytest.raises(NotData, match=r"a\.json is not a regular file"):
        refuse_links(run / "imported", home=run)


def test_the_cache_of_the_hub_links_to_its_blobs_alone(tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "1").write_text("{}")
    (tmp_path / "private").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/1")
    refuse_links(snapshot)
    (tmp_path / "model").symlink_to(snapshot)
    refuse_links(tmp_path / "model")
    (snapshot / "tokenizer.json").symlink_to("../../private")
    with pytest.raises(NotData, match=r"tokenizer\.json is a link"):
        refuse_links(snapshot)
