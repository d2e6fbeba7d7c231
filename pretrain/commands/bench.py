"""`megatron-ladder bench trace`, `bench kinds` and `bench plan`."""

import sys

import tyro

from pretrain.commands.users import for_users

BENCH_USAGE = """usage: megatron-ladder bench trace|kinds|plan [options]     (--help says more)

  trace  one step on local ranks as timelines: which collectives fly while what computes
  kinds  every residual kind on this machine's GPUs, over their real links: a result file to send us
  plan   step time, memory and bubble of a model's layouts on a cluster, ranked (modelled)
"""


@for_users
def bench(argv: list[str]) -> int:
    """Measures the overlap on this machine (`trace`, `kinds`), or models it on a cluster (`plan`)."""
    name, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    prog = f"megatron-ladder bench {name}"
    if name == "trace":
        from pretrain.bench.trace import TraceOptions, main_trace

        # The options are parsed here, so that mistakes in them are refused before ranks start.
        main_trace(tyro.cli(TraceOptions, args=rest, prog=prog), rest)
        return 0
    if name == "kinds":
        from pretrain.bench.kinds import KindsOptions, main_kinds

        return main_kinds(tyro.cli(KindsOptions, args=rest, prog=prog), rest)
    if name == "plan":
        from pretrain.plan.table import PlanOptions, main_plan

        return main_plan(tyro.cli(PlanOptions, args=rest, prog=prog))
    print(BENCH_USAGE, end="", file=sys.stdout if name in ("-h", "--help") else sys.stderr)
    return 0 if name in ("-h", "--help") else 2
