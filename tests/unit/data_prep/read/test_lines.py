"""Lines and plain text, however a file is cut."""

import itertools
from collections.abc import Iterator

from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.read.documents import read_documents
from data_prep.read.lines import line_blocks
from data_prep.read.reading import BadLines, Reading
from data_prep.read.sources import find_sources


def test_plain_text_by_file_paragraph_and_line(tmp_path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("one\ntwo\n\n\nthree\n\nfour")

    def read(kind: str) -> list[str]:
        (source,) = find_sources((file,))
        reading = Reading(text_documents=kind)
        return list(read_documents(source, reading, BadLines(0), lambda _: None))

    assert read("file") == ["one\ntwo\n\n\nthree\n\nfour"]
    assert read("paragraph") == ["one\ntwo\n", "three\n", "four\n"]
    assert read("line") == ["one", "two", "", "", "three", "", "four"]


def chunks(data: bytes, cuts: list[int], begin: int, end: int) -> Iterator[tuple[bytes, bool]]:
    """The bytes from `begin` on in chunks, those behind `end` not owned."""
    edges = sorted({begin, end, len(data), *(c for c in cuts if begin < c < len(data))})
    return ((data[a:b], a < end) for a, b in itertools.pairwise(edges))


@given(
    st.text("ab\n", max_size=60).map(str.encode),
    st.lists(st.integers(0, 60), max_size=6),
    st.lists(st.integers(1, 59), max_size=4, unique=True),
    st.integers(1, 8),
    st.integers(1, 20),
)
@settings(max_examples=500, deadline=None)
def test_every_line_is_in_one_range_however_the_file_is_cut(
    data: bytes, cuts: list[int], ranges: list[int], longest: int, block_bytes: int
) -> None:
    expected: list[bytes | None] = list(data.split(b"\n"))
    expected = [x if len(x) <= longest else None for x in expected[: None if expected[-1] else -1]]
    edges = [0, *sorted(r for r in ranges if r < len(data)), len(data)]
    found: list[bytes | None] = []
    for begin, end in itertools.pairwise(edges):
        pieces = chunks(data, cuts, begin, end)
        number = 1
        for first, lines in line_blocks(
            pieces, inside=begin > 0, longest=longest, block_bytes=block_bytes
        ):
            assert first == number
            number += len(lines)
            found += lines
            lines.clear()  # as the reader does, to free them
    assert found == expected
