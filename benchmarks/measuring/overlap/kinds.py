"""Which kinds of layers overlap.py compares."""

from pretrain.bench.kinds_plan import KINDS, NO_COMM

ALWAYS = ("standard", "ladder")
# What else can be measured, by the words of `--also`.
ALSO = {
    "standard-halves": "standard in halves",
    "parallel": "parallel",
    "parallel-halves": "parallel in halves",
    "hybrid": "hybrid (last half)",
    "parallel-ladder": "parallel-ladder",
    NO_COMM: NO_COMM,
}


def chosen(also: list[str], micro_batch_size: int) -> tuple[list[str], dict[str, str]]:
    """Names of the kinds to measure, in the order of KINDS, and why others were left out."""
    wanted = {*ALWAYS, *(ALSO[word] for word in also if word in ALSO)}
    odd = micro_batch_size % 2 == 1
    left_out = {
        name: f"a micro-batch of {micro_batch_size} has no two equal halves"
        for name in KINDS
        if name in wanted and odd and KINDS[name].halves
    }
    return [name for name in KINDS if name in wanted and name not in left_out], left_out
