"""Starts the ranks of a benchmark of tensor parallelism: real ones, or one that plays rank 0 of many."""

import argparse
import sys

from pretrain.bench.ranks import join
from pretrain.ranks import launched_rank
from pretrain.start.launch import become_torchrun

TP = 2


def add_fake_tp(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--fake-tp", type=int, help="one process as rank 0 of this many")


def start(args: argparse.Namespace) -> tuple[int, str]:
    """Without --fake-tp this process becomes torchrun with two ranks of the script.

    Returns:
        The tensor-parallel size, and the device's name.
    """
    if args.fake_tp is None and launched_rank() is None:
        become_torchrun(TP, *sys.argv)
    tp = args.fake_tp or TP
    return tp, join(tp, fake=args.fake_tp is not None)
