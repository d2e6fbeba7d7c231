"""benchmarks/measuring/overlap: what is compared, and how much of a link's time can be hidden."""

import pytest

from measuring.overlap import hidden, kinds
from megatron_ladder.config import ModelConfig
from pretrain.bench.kinds_plan import BLOCKING, KINDS
from pretrain.plan.planner import Submodule

LONG = Submodule(100.0, 200.0, 50.0)


@pytest.mark.parametrize("layers", [1, 4, 24])
def test_how_much_can_be_hidden(layers: int) -> None:
    """Counted along docs/design/overlap.md: of n sub-modules, only a pass's ends stand alone."""
    n = 2 * layers
    # Forward's last all-reduce; backward's last runs behind a weight gradient. With sequence parallelism
    # forward's first all-gather and last reduce-scatter, of 2 n; backward's first all-gather, of 3 n.
    whole = {
        False: {"forward": (n - 1) / n, "backward": 1, "total": (2 * n - 1) / (2 * n)},
        True: {"forward": 1 - 2 / (2 * n), "backward": 1 - 1 / (3 * n), "total": 1 - 3 / (5 * n)},
    }
    for sp, expected in whole.items():
        for name in ("ladder", "parallel-ladder"):
            assert hidden.most_by_layers(KINDS[name], layers, sp) == pytest.approx(expected)
        # The same messages stand alone, of half the size.
        in_halves = {p: (1 + share) / 2 for p, share in expected.items()}
        for name in ("standard in halves", "parallel in halves"):
            assert hidden.most_by_layers(KINDS[name], layers, sp) == pytest.approx(in_halves)


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.hides])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_the_planner_agrees_where_computation_is_long(name: str, sequence_parallel: bool) -> None:
    found = hidden.most_by_planner(KINDS[name], 6, sequence_parallel, (LONG, LONG), 1.0)
    assert found == pytest.approx(hidden.most_by_layers(KINDS[name], 6, sequence_parallel))


def test_a_slow_link_cannot_hide_behind_what_is_shorter() -> None:
    short = Submodule(1.0, 2.0, 0.5)
    slow = hidden.most_by_planner(KINDS["ladder"], 4, False, (short, short), 2.0)
    assert slow["forward"] == pytest.approx(7 / 8 / 2)


def test_the_weight_gradients_share_of_backward() -> None:
    """Operations for a token: of q, k, v h (w + 2 kv), of the projection w h, of core attention s w, which
    backward has 2.5 times; GEMMs have them twice in backward."""
    sizes = {"tokens": 16384, "seq_length": 8192, "tp": 8, "fp8": False}
    of_70b = ModelConfig(8, 8192, 28672, 64, num_query_groups=8)
    h, kv, s = 8192, 1024, 8192
    by_hand = h * (h + 2 * kv) / (2 * h * (2 * h + 2 * kv) + 2.5 * s * h)
    on_cpu = hidden.weight_gradient_shares(of_70b, on_gpu=False, **sizes)
    assert on_cpu == pytest.approx((by_hand, 1 / 3))
    # On a GPU attention is less efficient than GEMMs, and norms, kernels and the rest take time.
    on_gpu = hidden.weight_gradient_shares(of_70b, on_gpu=True, **sizes)
    assert 0.6 * on_cpu[0] < on_gpu[0] < on_cpu[0] and 0.8 / 3 < on_gpu[1] < 1 / 3
    # FP8 makes the GEMMs shorter, and not core attention.
    in_fp8 = hidden.weight_gradient_shares(of_70b, on_gpu=True, **{**sizes, "fp8": True})
    assert in_fp8[0] < 0.8 * on_gpu[0]
    # Short sequences, and as many keys as queries: half of three quarters, as there is no core attention.
    plain = ModelConfig(8, 768, 1536, 8)
    short = hidden.weight_gradient_shares(plain, on_gpu=False, **{**sizes, "seq_length": 1})
    assert short == pytest.approx((3 / 8, 1 / 3), rel=1e-3)


def test_an_odd_micro_batch_leaves_halves_out_in_words() -> None:
    everything = list(kinds.ALSO)
    names, left_out = kinds.chosen(everything, 2)
    assert names == [name for name in KINDS if name != BLOCKING] and not left_out
    names, left_out = kinds.chosen([*everything, "autograd-order"], 1)
    assert not any(KINDS[name].halves for name in names)
    assert set(left_out) == {"standard in halves", "parallel in halves"}
    assert set(left_out.values()) == {"a micro-batch of 1 has no two equal halves"}
    assert kinds.chosen([], 1) == (["standard", "ladder"], {})


def test_times_are_compared_within_a_repetition() -> None:
    times = {
        ("standard", "link"): [(1.0, 1.0), (10.0, 10.0), (2.0, 2.0)],
        ("standard", "zero"): [(1.0, 1.0), (2.0, 2.0), (4.0, 4.0)],
        ("no-comm", "link"): [(0.5, 0.5), (1.0, 1.0), (2.0, 2.0)],  # it has no other
    }
    assert hidden.over_standard(times, "no-comm", "zero") == [0.5, 0.5, 0.5]
    assert hidden.over_standard(times, "no-comm", "link") == [0.1, 0.5, 1.0]


def test_the_uncertainty_of_a_share_is_that_of_its_medians() -> None:
    """The standard error of the median of n evenly spread times is half their range over sqrt(n)."""

    def spread(step: float) -> float:
        once = [(1.0, 1.0)] * 41
        times = {
            (BLOCKING, "zero"): once,
            (BLOCKING, "link"): [(2.0, 2.0)] * 41,
            ("ladder", "zero"): once,
            ("ladder", "link"): [(1.0 + step * i, 1.0) for i in range(41)],
        }
        assert hidden.uncertainty(times, "ladder", "backward") == 0
        return hidden.uncertainty(times, "ladder", "forward")

    standard_error = 0.41 / 2 / 41**0.5
    assert spread(0.01) == pytest.approx(1.645 * standard_error, rel=0.15)  # 90 % of a normal one
    assert spread(0.02) == pytest.approx(2 * spread(0.01))
