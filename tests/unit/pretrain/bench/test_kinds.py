"""`bench kinds`: order, memory and figures; a failure or a stop keeps what is measured."""

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core import parallel_state

from megatron_ladder.errors import UserError
from pretrain.bench import interleaved, kinds, kinds_ranks, wire
from pretrain.bench.kinds_page import draw, figures, table
from pretrain.bench.kinds_plan import (
    BLOCKING,
    KINDS,
    NO_COMM,
    STANDARD,
    Job,
    Setting,
    fitted,
    guessed_seconds,
    settings_of,
)
from pretrain.bench.machine import NO_MEMORY, Machine, reason
from pretrain.bench.ranks import join
from pretrain.config.presets import PRESETS

MODEL_8B = PRESETS["llama-3-8b"]().model
GIB = 2**30
TWO_CARDS = Machine("NVIDIA H100 80GB HBM3", 2, 80 * 10**9, {"nccl": "2.28"}, "")


# The plan.


def test_the_most_important_layouts_come_first() -> None:
    found = settings_of(MODEL_8B, 8, "bf16", fp8=True)
    assert len(set(found)) == len(found) == 2 * (6 + 4 + 4 + 2)
    order = [
        (s.fp8 is not None, s.tensor_model_parallel_size < 8, s.hardware_queues) for s in found
    ]
    assert order == sorted(order)
    assert found[0].layout == "TP 8, micro-batch 2, bf16"
    assert found[5].layout == "TP 8 SP, micro-batch 1, bf16, 8 queues"
    assert found[-1].layout == "TP 1, micro-batch 1, FP8 tensorwise"
    # Several queues are for the second stream of sequence parallelism.
    assert all(s.sequence_parallel for s in found if s.hardware_queues == 8)


def test_kinds_that_a_layout_cannot_have_are_not_in_it() -> None:
    found = settings_of(MODEL_8B, 2, "fp32", fp8=False)
    assert {s.hardware_queues for s in found} == {1}
    kinds_of = {(s.tensor_model_parallel_size, s.micro_batch_size): s.kinds for s in found}
    assert kinds_of[2, 2] == list(KINDS)
    assert set(kinds_of[2, 2]) - set(kinds_of[2, 1]) == {
        "standard in halves",
        "parallel in halves",
    }
    assert kinds_of[1, 2] == kinds_of[1, 1] == ["standard", "parallel"]


def setting(tp: int, **changes: Any) -> Setting:
    return replace(Setting(tp, False, 1, "bf16", None, 1, 32), **changes)


def test_as_many_layers_as_fit_are_taken() -> None:
    # A layer of 218.1 M weights: 2 bytes, and 2 for the gradient. Kept for each of 2 x 8192 tokens: the
    # norms' inputs and outputs, 4 h; queries and output, keys and values, 2 (h + h/4), with 4 bytes for
    # each of 32 heads; 3 of the MLP's width. 80 GB, less 5 % and 6 GiB.
    weights = 4096 * (2 * 4096 + 2 * 1024 + 3 * 14336) + 2 * 4096
    kept = 2 * 8192 * (2 * (4 * 4096 + 2 * (4096 + 1024) + 3 * 14336) + 4 * 32)
    whole = (0.95 * 80e9 - 6 * GIB) / (4 * weights + kept)
    two = setting(1, micro_batch_size=2)
    assert fitted(two, MODEL_8B, 8192, 80 * 10**9).num_layers == int(whole) == 22
    assert fitted(setting(1), MODEL_8B, 8192, 80 * 10**9).num_layers == 32
    assert fitted(two, MODEL_8B, 8192, 0).num_layers == 32  # a CPU's memory is not planned
    in_fp8 = setting(2, fp8="tensorwise", micro_batch_size=2)
    assert fitted(in_fp8, MODEL_8B, 8192, 40 * 10**9).num_layers < (
        fitted(setting(2, micro_batch_size=2), MODEL_8B, 8192, 40 * 10**9).num_layers
    )


@pytest.mark.parametrize(
    ("wrong", "card_bytes", "words"),
    [
        (setting(3), 80 * 10**9, "num_attention_heads 32 is not divisible"),
        (setting(1), 8 * 10**9, "2 do not fit"),
        (setting(16, fp8="tensorwise"), 0, "num_query_groups 8 is not divisible"),
    ],
)
def test_layouts_that_do_not_fit_say_why(wrong: Setting, card_bytes: int, words: str) -> None:
    with pytest.raises(UserError, match=words):
        fitted(wrong, MODEL_8B, 8192, card_bytes)


def test_the_guess_follows_the_work() -> None:
    one, two = (guessed_seconds(setting(tp), MODEL_8B, 8192, "H100") for tp in (8, 4))
    assert one < two < 2 * one
    assert guessed_seconds(setting(8), MODEL_8B, 8192, "cpu") > 100 * one


# The figures.


def row(**kinds_s: list[list[float]]) -> dict[str, Any]:
    names = {"waiting": BLOCKING, "without": NO_COMM}
    found = {names.get(name, name): {"forward_backward_s": t} for name, t in kinds_s.items()}
    layout = {"layout": "TP 4, micro-batch 2, bf16", "tensor_model_parallel_size": 4}
    rest = {"sequence_parallel": False, "micro_batch_size": 2, "precision": "bf16", "fp8": None}
    return {**layout, **rest, "num_layers": 8, "all_reduce_s": 0.01, "kinds": found}


def test_figures_by_hand() -> None:
    times = row(
        waiting=[[2.0, 4.0]] * 3,
        without=[[1.0, 2.0]] * 3,
        standard=[[2.0, 3.0], [2.0, 3.0], [4.0, 6.0]],
        ladder=[[1.25, 2.5], [1.25, 2.5], [2.5, 5.0]],  # the third repetition was slow for both
    )
    found = figures(times, num_layers=32, seq_length=1000)
    standard, ladder = found["kinds"][STANDARD], found["kinds"]["ladder"]
    assert (ladder["forward_s"], ladder["backward_s"]) == (1.25, 2.5)
    # 2000 tokens on 4 GPUs through a quarter of the model, in 3.75 s.
    assert ladder["tokens_per_s_per_gpu"] == pytest.approx(2000 / 4 / 4 / 3.75)
    assert standard["over_standard"] == 1.0
    assert ladder["over_standard"] == pytest.approx(5 / 3.75)
    assert ladder["hidden_share"] == {"forward": 0.75, "backward": 0.75, "total": 0.75}
    assert standard["hidden_share"] == pytest.approx(
        {"forward": 0.0, "backward": 0.5, "total": 1 / 3}
    )
    assert "hidden_share" not in found["kinds"][BLOCKING]
    assert found["link_over_compute"] == pytest.approx(0.01 / (1.0 / 16))


def test_there_is_no_share_of_nothing() -> None:
    times = row(waiting=[[1.0, 2.0]] * 3, without=[[0.99, 1.99]] * 3, ladder=[[0.5, 1.0]] * 3)
    found = figures(times, num_layers=8, seq_length=1000)
    assert set(found["kinds"]["ladder"]["hidden_share"].values()) == {None}
    assert "over_standard" not in found["kinds"]["ladder"]  # standard was not measured


def test_the_table_has_each_kinds_best_layout(tmp_path: Path) -> None:
    slow = figures(row(standard=[[2.0, 2.0]] * 3, ladder=[[2.0, 1.0]] * 3), 8, 1000)
    fast = figures(row(standard=[[2.0, 1.5]] * 3, ladder=[[2.0, 1.5]] * 3), 8, 1000)
    fast["layout"] = "TP 2"
    failed = {"layout": "TP 1", "num_layers": 8, "error": "out of memory", "fp8": None}
    report = {"rows": [slow, fast, failed], "options": {"preset": "p"}, "ranks": 4, "device": "d"}
    lines = {line.split()[0]: line for line in table(report).splitlines() if line}
    assert lines["standard"].endswith("TP 2") and " 1.000 " in lines["standard"]
    assert lines["ladder"].endswith("TP 4, micro-batch 2, bf16")
    assert "not quite with SP" in table(report)
    assert f" {3.5 / 3:.3f} " in lines["ladder"]
    draw(tmp_path / "p.png", {**report, "seq_length": 1000})
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert table({**report, "rows": [failed]}) == "Nothing has been measured."


# The command, with ranks that only pretend.

PRETEND = """
import json, signal, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
job = json.loads((folder / "job.json").read_text())
def leave(message):
    (folder / "ends").mkdir()
    end = dict(status=1, rank=1, host="h", message=message, unix_time=0.0)
    (folder / "ends" / "1.json").write_text(json.dumps(end))
    sys.exit(1)
for setting in job["settings"]:
    layout = (setting["tensor_model_parallel_size"], setting["sequence_parallel"],
              setting["micro_batch_size"])
    BEHAVIOUR
    with (folder / "rows.jsonl").open("a") as file:
        times = [[1.0, 2.0]] * 3
        kinds = {"standard": {"forward_backward_s": times}, "ladder": {"forward_backward_s": times}}
        file.write(json.dumps({**setting, "kinds": kinds}) + "\\n")
"""


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., tuple[int, dict[str, Any]]]]:
    """(what ranks do, minutes) -> the exit status and the report."""
    monkeypatch.setattr(kinds, "look", lambda: replace(TWO_CARDS, no_fp8="a GPU"))
    before = {number: signal.getsignal(number) for number in kinds.STOP_SIGNALS}

    def command(behaviour: str, minutes: float = 5.0) -> tuple[int, dict[str, Any]]:
        program = PRETEND.replace("BEHAVIOUR", behaviour)
        monkeypatch.setattr(
            kinds,
            "torchrun_command",
            lambda _ranks, *target: ([sys.executable, "-c", program, target[-1]], dict(os.environ)),
        )
        options = kinds.KindsOptions(tmp_path / "out" / "k.json", minutes=minutes)
        status = kinds.main_kinds(options, ["/a/folder/k.json"])
        return status, json.loads((tmp_path / "out" / "k.json").read_text())

    yield command
    for number, handler in before.items():
        signal.signal(number, handler)


def layouts(report: dict[str, Any], *, error: str = "") -> list[tuple[int, bool, int, int]]:
    return [
        (
            row["tensor_model_parallel_size"],
            row["sequence_parallel"],
            row["micro_batch_size"],
            row["num_layers"],
        )
        for row in report["rows"]
        if (error in row.get("error", "") if error else "error" not in row)
    ]


def test_the_result_file_says_what_was_run_and_where(run: Any, tmp_path: Path) -> None:
    status, report = run("pass")
    assert status == 0 and report["ended"] == "complete"
    assert report["command"] == "megatron-ladder bench kinds k.json"
    assert report["device"] == TWO_CARDS.device and report["cards"] == 2
    assert report["versions"]["nccl"] == "2.28" and report["versions"]["torch"]
    assert report["schema"] == kinds.SCHEMA and report["topology"] is None  # no nvidia-smi here
    assert len(layouts(report)) == 8
    assert all(row["kinds"]["ladder"]["over_standard"] == 1.0 for row in report["rows"])
    assert str(tmp_path) not in json.dumps(report)
    assert (tmp_path / "out" / "k.png").exists()
    with pytest.raises(UserError, match="is there already"):
        run("pass")


def test_ranks_that_fail_have_a_row_with_the_reason_and_the_rest_goes_on(run: Any) -> None:
    status, report = run("if layout == (2, False, 1): leave('NCCL: unhandled system error')")
    assert status == 0
    assert layouts(report, error="rank 1: NCCL: unhandled") == [(2, False, 1, 32)]
    assert len(layouts(report)) == 7


def test_out_of_memory_is_tried_again_with_half_as_many_layers(run: Any) -> None:
    status, report = run(
        "if layout[0] == 1 and setting['num_layers'] > 4: leave('out of memory: 80 GiB')"
    )
    assert status == 0
    alone = [found for found in layouts(report) if found[0] == 1]
    assert [found[3] for found in alone] == [2, 4]  # of 22 with micro-batch 2, and of 32
    assert len(layouts(report, error="out of memory")) == 3 + 3


def test_ranks_that_end_or_hang_without_a_word_have_a_row_too(
    run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(kinds, "PATIENCE_S", 1.5)
    behaviour = (
        "(time.sleep(99) if layout[0] == 1 else None, layout[1:] == (True, 2) and sys.exit(3))"
    )
    status, report = run(behaviour)
    assert status == 0
    assert len(layouts(report, error="exit status 3")) == 2  # one queue, and eight
    assert len(layouts(report, error="no pass has ended")) == 2
    assert len(layouts(report)) == 4


def test_nothing_measured_is_a_failure(run: Any) -> None:
    status, report = run("sys.exit(3)")
    assert status == 1
    assert len(layouts(report, error="exit status 3")) == 8


def test_rows_of_one_queue_have_no_priority(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "TORCH_NCCL_HIGH_PRIORITY": "1",
        "NCCL_TOPO_FILE": "/a/folder/topology.xml",
        "NVTE_FLASH_ATTN": "0",
        "CUDA_LAUNCH_BLOCKING": "0",
        "A_SECRET": "x",
    }.items():
        monkeypatch.setenv(name, value)
    _, report = run("import os; setting['priority'] = os.environ.get('TORCH_NCCL_HIGH_PRIORITY')")
    found = {(row["hardware_queues"], row["priority"]) for row in report["rows"]}
    assert found == {(1, None), (8, "1")}
    assert {
        "TORCH_NCCL_HIGH_PRIORITY=1",
        "NCCL_TOPO_FILE=topology.xml",
        "NVTE_FLASH_ATTN=0",
        "CUDA_LAUNCH_BLOCKING=0",
    } <= set(report["environment"])
    assert "A_SECRET" not in str(report["environment"])


LATE = (  # the second layout ends late, and the third never
    "time.sleep(99 if layout[1] else 0 if layout[2] == 2 else"
    " job['end_unix_time'] + 0.5 - time.time())"
)


@pytest.mark.parametrize(
    ("behaviour", "grace_s", "kept", "failed"),
    [
        # The layout that is being measured is kept, and no other begins.
        (LATE, 60.0, [(2, False, 2, 32), (2, False, 1, 32)], 0),
        (LATE + "; layout[2] == 1 and leave('NCCL: unhandled')", 60.0, [(2, False, 2, 32)], 1),
        ("layout[2] == 1 and time.sleep(99)", 0.5, [(2, False, 2, 32)], 0),
    ],
    ids=["late", "late failure", "hang"],
)
def test_the_time_is_kept(
    run: Any,
    monkeypatch: pytest.MonkeyPatch,
    behaviour: str,
    grace_s: float,
    kept: list[tuple[int, bool, int, int]],
    failed: int,
) -> None:
    monkeypatch.setattr(kinds, "GRACE_S", grace_s)
    begin = time.monotonic()
    status, report = run(behaviour, minutes=3 / 60)
    assert status == 0 and report["ended"] == "no time was left"
    assert layouts(report) == kept
    assert len(layouts(report, error="unhandled")) == failed
    assert len(layouts(report, error="no time was left")) == 8 - len(kept) - failed
    assert time.monotonic() - begin < 60  # it did not wait for the ranks


def test_a_stop_keeps_what_is_measured(
    run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rows, processes = kinds._rows, []

    def until_a_signal(folder: Path, ranks: Any, end_s: float) -> Iterator[Any]:
        processes.append(ranks)
        yield next(rows(folder, ranks, end_s))
        so_far = json.loads((tmp_path / "out" / "k.json").read_text())  # SIGKILL would keep it, too
        assert so_far["ended"] == "not yet" and len(so_far["rows"]) == 1
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(kinds, "_rows", until_a_signal)
    status, report = run("layout[2] == 1 and time.sleep(99)")
    assert status == 130 and report["ended"] == "stopped by a signal"
    assert layouts(report) == [(2, False, 2, 32)] and len(report["rows"]) == 1
    assert processes[0].returncode == -signal.SIGTERM
    assert (tmp_path / "out" / "k.png").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"preset": "lama-3-8b"}, "did you mean llama-3-8b"),
        ({"preset": "adapt"}, "choose one of debug"),
        ({"minutes": 0.0}, "more than 0"),
        ({"minutes": 20_000.0}, "20000: give more than 0 and less than 10000"),
        ({"nproc_per_node": 1}, "nothing to hide"),
        ({"output": Path("k.txt")}, "ends in .json"),
    ],
)
def test_mistakes_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        kinds.KindsOptions(**{"output": Path("k.json"), **options})


def test_one_gpu_and_torchrun_are_refused(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "look", lambda: replace(TWO_CARDS, cards=1))
    with pytest.raises(UserError, match="1 GPU"):
        run("pass")
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "h"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(UserError, match="without torchrun"):
        run("pass")


# The ranks.

CUBLAS = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
NCCL = """NCCL error in: NCCLUtils.cpp:94, unhandled cuda error (run with NCCL_DEBUG=INFO for details)
Last error:
Cuda failure 2 'out of memory'"""


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError(CUBLAS), True),
        (torch.distributed.DistBackendError(NCCL), True),
        (torch.distributed.DistBackendError("NCCL error in: x, remote process exited"), False),
    ],
)
def test_memory_that_libraries_lack_is_named(error: Exception, memory: bool) -> None:
    assert reason(error).startswith(f"{NO_MEMORY}: ") == memory


def test_a_kind_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds_ranks, "slowest", lambda times: times)

    def raises(error: Exception) -> Callable[[], tuple[float, ...]]:
        def run() -> tuple[float, ...]:
            raise error

        return run

    runs = {"ladder": lambda: (1.0, 2.0), "parallel": raises(ValueError("no kernel"))}
    failed: dict[str, str] = {}
    for name in list(runs):
        kinds_ranks._try(name, runs, failed)
    assert list(runs) == ["ladder"] and failed == {"parallel": "ValueError: no kernel"}
    # One rank may raise these alone, while the others are in a collective of the layers: it ends.
    for alone in (torch.OutOfMemoryError("CUDA out of memory."), RuntimeError(CUBLAS)):
        runs["standard"] = raises(alone)
        with pytest.raises(type(alone)):
            kinds_ranks._try("standard", runs, failed)
    assert "standard" not in failed
    # It failed on another rank alone.
    monkeypatch.setattr(kinds_ranks, "slowest", lambda _: (1.0,))
    kinds_ranks._try("ladder", runs, failed)
    assert failed["ladder"] == "it failed on another rank"


def test_all_kinds_have_the_same_weights_in_memory() -> None:
    join(2, fake=True)
    try:
        model = PRESETS["debug"]().model
        job = Job(model, 32, (), 0, 0.0)
        layout = Setting(2, True, 2, "fp32", None, 1, 2)
        decoders: dict[str, Any] = {}
        failed: dict[str, str] = {}
        for name in layout.kinds:
            kinds_ranks._build(name, job, layout, decoders, failed)
        assert not failed and list(decoders) == layout.kinds
        assert decoders[BLOCKING] is decoders[STANDARD]
        assert len({id(decoder) for decoder in decoders.values()}) == len(KINDS) - 1
        for name in ("self_attention.linear_qkv", "mlp.linear_fc2"):
            weights = [
                decoder.block.layers[1].get_submodule(name).weight for decoder in decoders.values()
            ]
            assert len({weight.data_ptr() for weight in weights}) == 1
        configs = {name: decoder.block.config for name, decoder in decoders.items()}
        for name, config in configs.items():
            assert config.halves == ("halves" in name)
            assert config.sequence_parallel == (name != NO_COMM)  # it has no sums to cut
            assert decoders[name].model.residual == KINDS[name].residual
        hybrid = decoders["hybrid (last half)"].model
        assert hybrid.layer_residuals() == ("standard", "ladder")
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def test_standard_waits_at_once_where_it_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    waiting: list[object] = []

    @contextlib.contextmanager
    def at_once(group: object) -> Iterator[None]:
        waiting.append(group)
        yield
        waiting.append("over")

    monkeypatch.setattr(kinds_ranks, "waiting_at_once", at_once)
    decoder: Any = SimpleNamespace(step=lambda: (float(len(waiting)), 0.0))
    group: Any = object()
    assert kinds_ranks._pass(decoder, False, group, tmp_path) == (0.0, 0.0)
    assert kinds_ranks._pass(decoder, True, group, tmp_path) == (1.0, 0.0)
    assert waiting == [group, "over"]
    assert (tmp_path / "alive").exists()


def test_repetitions_end_in_time_but_not_before_three(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interleaved, "slowest", lambda times: times)
    monkeypatch.setattr(interleaved.dist, "get_rank", lambda: 1)

    now_s = 0.0
    monkeypatch.setattr(interleaved, "time", SimpleNamespace(perf_counter=lambda: now_s))

    def a_pass() -> tuple[float, ...]:
        nonlocal now_s
        now_s += 4.0  # with barriers, and what else is in no pass's own time
        return 1.0, 2.0

    def measured(limit_s: float) -> int:
        return len(interleaved.measure({"a": a_pass}, 10, limit_s)["a"])

    # The warm-up and three repetitions take 16 s. A fourth would end at 20 s.
    assert measured(-1.0) == measured(16.5) == measured(19.9) == 3
    assert measured(20.0) == 4
    assert measured(1e9) == 10


def test_a_collective_is_waited_for_where_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[object] = []

    def all_reduce(_x: object, group: object, async_op: bool = False) -> Any:
        return SimpleNamespace(wait=lambda: waited.append(group)) if async_op else None

    place = SimpleNamespace(all_reduce=all_reduce)
    monkeypatch.setattr(wire, "_ENTRIES", ((place, "all_reduce", "all-reduce"),))
    ours: Any = object()
    with wire.waiting_at_once(ours):
        work = place.all_reduce(None, group=ours, async_op=True)
        assert waited == [ours] and work is not None  # the layer waits once more, for nothing
        place.all_reduce(None, group=object(), async_op=True)
        assert waited == [ours]
        assert place.all_reduce(None, group=ours) is None
    assert place.all_reduce is all_reduce
