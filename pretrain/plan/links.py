"""The time of a tensor-parallel collective over a link, and of a transfer over the network.

The tables are published measurements of all-reduces among 8 (NVSwitch, P2P off) or 16 (two nodes) H100s.
For other numbers of ranks they are used unchanged, unless `for_ranks` scales them.
"""

import bisect
from dataclasses import dataclass, replace

GPUS_PER_NODE = 8
KIB, MIB = 2**10, 2**20


@dataclass(frozen=True)
class Link:
    """The time of one all-reduce by message size, interpolated linearly between measured points."""

    points: tuple[tuple[float, float], ...]
    """(bytes of the whole message, seconds), in ascending order of bytes. A smaller message takes the time
    of the first point, the latency. Beyond the last point, the bandwidth between the last two holds."""
    ranks: int = 8
    """The number of ranks in the measurement."""

    @classmethod
    def of(cls, latency_s: float, bytes_per_s: float, ranks: int = 8) -> "Link":
        """A link of a latency and an algorithm bandwidth: bytes of the message over time, not the bandwidth
        of the bus."""
        return cls(((0.0, latency_s), (bytes_per_s, latency_s + 1.0)), ranks)

    @property
    def latency_s(self) -> float:
        return self.points[0][1]

    def all_reduce_seconds(self, nbytes: float) -> float:
        """Seconds of an all-reduce. `nbytes` is the size of the message that every rank holds."""
        if len(self.points) == 1 or nbytes <= self.points[0][0]:
            return self.latency_s
        after = bisect.bisect_left([size for size, _ in self.points], nbytes)
        after = min(after, len(self.points) - 1)
        (size, seconds), (next_size, next_seconds) = self.points[after - 1 : after + 1]
        return seconds + (nbytes - size) * (next_seconds - seconds) / (next_size - size)

    def for_ranks(self, ranks: int) -> "Link":
        """The same link between another number of ranks.

        The part of the time above the latency is scaled by what a ring moves, 2 (n - 1) / n of the message.
        The latency stays the same. A single rank communicates nothing.
        """
        if ranks == 1:
            return PRESETS["zero"]
        factor = ((ranks - 1) / ranks) / ((self.ranks - 1) / self.ranks)
        return replace(self.with_bandwidth(1 / factor), ranks=ranks)

    def with_bandwidth(self, times: float) -> "Link":
        """The same link with this many times its bandwidth: all above the latency takes less time."""
        low = self.latency_s
        return replace(
            self, points=tuple((size, low + (s - low) / times) for size, s in self.points)
        )


PRESETS: dict[str, Link] = {
    # 8 x H100 with NVSwitch. Where a range was published, its middle is taken. The bandwidth between the
    # last two points is 274 GB/s; a fit of the points from 2 MiB up gives 31 us and 222 GB/s.
    "nvswitch": Link(
        (
            (16 * KIB, 20.7e-6),
            (64 * KIB, 23.1e-6),
            (256 * KIB, 24.8e-6),
            (1 * MIB, 28.5e-6),
            (4 * MIB, 54.5e-6),
            (8 * MIB, 83e-6),
            (16 * MIB, 128.5e-6),
            (32 * MIB, 195e-6),
            (64 * MIB, 316e-6),
            (128 * MIB, 561e-6),
        )
    ),
    # 8 x H100 without peer-to-peer access: the latency is derived from arXiv 2501.06589's tables.
    "p2p-off": Link.of(65e-6, 37e9),
    # 2 x 8 H100 with 8 x 400 Gb/s NICs a node, measured on one cloud.
    "two-nodes": Link(
        (
            (32 * KIB, 155e-6),
            (1 * MIB, 203e-6),
            (16 * MIB, 978e-6),
            (64 * MIB, 1262e-6),
        ),
        ranks=16,
    ),
    # The same nodes over NDR InfiniBand. The latency is the published floor, 46 to 48 us; the bandwidth is
    # that between the last two points above. The paper's 405B on two nodes shows about 45 us an all-reduce.
    "two-nodes-ndr": Link.of(47e-6, 177e9, ranks=16),
    "zero": Link(((0.0, 0.0),)),
}


@dataclass(frozen=True)
class Network:
    """The network for data-parallel collectives and pipeline transfers: one GPU's part, one direction."""

    latency_s: float
    bytes_per_s: float

    def seconds(self, nbytes: float) -> float:
        """Seconds in which one GPU sends `nbytes`; 0 for nothing."""
        return self.latency_s + nbytes / self.bytes_per_s if nbytes else 0.0


# Between two GPUs of a node. The data sheet says 450 GB/s in one direction; two thirds of it are assumed.
NVLINK = Network(latency_s=10e-6, bytes_per_s=300e9)
# The same of links in PRESETS where it is another. P2P off: the latency of the all-reduce, and what a ring
# moves for its bandwidth, 2 x 7/8 of the message.
IN_A_NODE = {
    "p2p-off": Network(latency_s=65e-6, bytes_per_s=37e9 * 7 / 4),
    "zero": Network(latency_s=0.0, bytes_per_s=float("inf")),
}


def network_of(gbit_per_s: float) -> Network:
    """A network with one NIC for each GPU; 400 Gb/s are 50e9 bytes/s. The latency of 10 us is assumed."""
    return Network(latency_s=10e-6, bytes_per_s=gbit_per_s * 1e9 / 8)
