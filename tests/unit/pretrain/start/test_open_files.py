"""The limit of open files: raised as far as allowed, and named where it is too low."""

import resource
from unittest.mock import Mock

import pytest

from megatron_ladder.errors import UserError
from pretrain.start.open_files import check_open_files, needed, raise_limit

NONE = resource.RLIM_INFINITY


@pytest.mark.parametrize(
    ("soft", "hard", "wanted"),
    [
        (1024, 4096, 4096),
        (4096, 4096, 4096),
        (1024, 10**9, 1 << 20),  # as in containers
        (1024, NONE, 1 << 20),
        (10**9, 10**9, 10**9),  # never lowered
        (NONE, NONE, 1 << 20),
    ],
)
def test_the_limit_is_raised(monkeypatch, soft: int, hard: int, wanted: int) -> None:
    given = Mock()
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", given)
    assert raise_limit() == wanted
    if soft in (wanted, NONE):
        given.assert_not_called()
    else:
        given.assert_called_once_with(resource.RLIMIT_NOFILE, (wanted, hard))


def test_a_limit_that_is_too_low_is_named(monkeypatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (4096, 4096))
    few, many = [Mock()] * 80, [Mock()] * 1000
    check_open_files(few, 8)
    with pytest.raises(
        UserError, match=r"1,000 data sets and 8 ranks .* 7,527 open .* allows 4,096"
    ):
        check_open_files(many, 8)
    # The first rank has a connection to each of the others.
    with pytest.raises(UserError, match="8 data sets and 4,096 ranks"):
        check_open_files(few[:8], 4096)
    assert needed(8, 4096) > 4096
