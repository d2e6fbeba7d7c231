import pytest

from pretrain.sizes import in_time, in_units


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (54_321, "54.3 kB"),
        (1_234_567, "1.23 MB"),
        (16_870_000_000, "16.9 GB"),
        (80e9, "80.0 GB"),
        (141e9, "141 GB"),
        (999_600, "1.00 MB"),
        (9.996e12, "10.0 TB"),
    ],
)
def test_bytes_have_the_unit_that_fits(value: float, words: str) -> None:
    assert in_units(value, "B") == words


def test_numbers_have_no_unit() -> None:
    assert [in_units(n) for n in (12, 12_345_678)] == ["12", "12.3 M"]


def test_times_have_two_parts_at_most() -> None:
    assert [in_time(s) for s in (5.4, 65, 3600, 3725)] == ["5s", "1m05s", "1h00m", "1h02m"]
