import numpy as np

from pretrain.bench.wire import _Link


def test_a_message_is_under_way_from_its_last_start_and_behind_the_one_before() -> None:
    starts = np.zeros((_Link.SLOTS, 2))
    ours, theirs = _Link(starts, 0), _Link(starts, 1)
    for link in (ours, theirs):
        assert [link.start(s) for s in (1.0, 0.5, 0.25)] == [0, 1, 2]
    starts[:3] = [[10.0, 12.0], [12.5, 12.1], [20.0, 14.0]]
    for link in (ours, theirs):  # asked in any order, on any rank
        assert link.arrival(2) == 20.25  # the link was free
        assert link.arrival(0) == 13.0
        assert link.arrival(1) == 13.5  # it was not


def test_a_step_begins_with_an_empty_link() -> None:
    starts = np.full((_Link.SLOTS, 2), 7.0)
    _Link(starts, 0)
    assert (starts[:, 0] == 0).all() and (starts[:, 1] == 7).all()
