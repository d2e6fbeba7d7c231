"""A run's metrics: lines of metrics.jsonl, readable lines on the console, TensorBoard, optional W&B.

docs/reference/formats.md describes the lines of metrics.jsonl.
"""

import contextlib
import json
import os
import secrets
import sys
import time as clock
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from megatron_ladder.errors import UserError
from megatron_ladder.json_files import MOST_BYTES as MOST_LINE_BYTES
from megatron_ladder.json_files import parse_json, read_json
from pretrain.files import write_atomically
from pretrain.run.lines import check_metrics
from pretrain.sizes import in_time

# Dense bf16 peaks in FLOP/s, from the vendor's data sheets, by a part of the device's name.
# The first part that is in the name counts.
PEAK_FLOPS = (
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H200", 989e12),
    ("GH200", 989e12),
    ("B200", 2250e12),
    ("B100", 1750e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("H800", 989e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("RTX 4090", 165e12),
)

# Figures of a step of a model with experts (load_balance in pretrain/model/routers.py).
OF_EXPERTS = ("expert_imbalance", "dropped_share", "router_entropy")
# Lines of what was done beside the training (pretrain/watch).
OF_WATCH = ("evaluation", "export", "watch_failed", "watch_left_out")
# So many values of TensorBoard wait for its thread before training does. Its own number is 10.
_TENSORBOARD_QUEUE = 10_000


def peak_flops(device_name: str) -> float | None:
    """Peak dense bf16 FLOP/s of a GPU; None when the GPU is not in PEAK_FLOPS."""
    return next((peak for part, peak in PEAK_FLOPS if part in device_name), None)


def flops_per_token(
    *, num_layers: int, attention_width: int, seq_length: float, matmul_parameters: int
) -> float:
    """Floating-point operations of forward and backward for one token.

    These are 6 N for the matrix multiplications with N weights, and 12 L w s for attention's two products
    of width w, where causality is ignored (PaLM, arXiv 2204.02311, appendix B). Recomputation does not
    count, because MFU counts only the operations that the model needs.

    Args:
        seq_length: tokens of the sequence that a token is in. With windows, or where documents are apart,
            it is `attention_length` (megatron_ladder/fields/windows.py).
    """
    return 6.0 * matmul_parameters + 12.0 * num_layers * attention_width * seq_length


def has_finished(run_dir: Path, train_steps: int) -> bool:
    """Whether the run has come to the end of its schedule, with the validation after the last save."""
    return any(
        line["kind"] == "end" and line["reason"] == "finished" and line["step"] >= train_steps
        for line in _existing(run_dir)
    )


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl. An incomplete last line, left by a kill, is left out.

    Raises:
        UserError: there is no such file, or a line is not a JSON object.
    """
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        raise UserError(
            f"{run_dir} holds no metrics.jsonl: is it a run of `megatron-ladder train`?"
        )
    metrics = []
    with path.open("rb") as file:
        number = 0
        # Text after the last newline is an incomplete line.
        while (line := file.readline(MOST_LINE_BYTES)).endswith(b"\n"):
            number += 1
            where = f"{path}:{number} is not a line of metrics"
            metrics.append(parse_json(line, where))
            check_metrics(metrics[-1], where)
        if len(line) == MOST_LINE_BYTES:
            raise UserError(f"{path}:{number + 1} is not a line of metrics: it is too long")
    return metrics


class MetricsLog:
    """Writes a run's metrics. Only rank 0 makes one. Lines are written in a thread, one after another, so
    that training does not wait for the disk.

    Args:
        run_dir: the run's folder. Lines of steps after `resume_step` are removed first.
        resume_step: the step of the checkpoint from which training continues; 0 for a new run.
        train_steps: of the whole run, for the ETA.
        tensorboard: also write RUN/tensorboard.
        wandb: also log to Weights & Biases.
        config: the run's configuration, for W&B.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        resume_step: int,
        train_steps: int,
        tensorboard: bool,
        wandb: bool,
        config: dict[str, Any],
    ) -> None:
        self.has_reader = True
        """False when what reads the printed lines has ended: the run is to stop."""
        self._run_dir = run_dir
        self._train_steps = train_steps
        self._thread = ThreadPoolExecutor(1, "metrics")
        self._baselines: set[str] = set()
        self._validated: dict[int, list[str]] = {}
        self._file = _appended(run_dir / "metrics.jsonl")
        self.go_back(resume_step)
        self._tensorboard: Any = None
        self._wandb: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(
                str(run_dir / "tensorboard"),
                purge_step=resume_step + 1,
                max_queue=_TENSORBOARD_QUEUE,
            )
        if wandb:
            import wandb as wandb_package

            self._wandb = wandb_package.init(
                dir=run_dir,
                name=run_dir.name,
                config=config,
                id=_wandb_id(run_dir),
                resume="allow",
            )
            # W&B takes no figures of an earlier step than the last one.
            self._wandb.define_metric("evaluation/*", step_metric="evaluation/step")

    def go_back(self, step: int) -> None:
        """Removes the lines of steps after `step`: training continues from that step's checkpoint."""
        self.wait()
        kept = [m for m in _existing(self._run_dir) if _is_kept(m, step)]
        self.time_so_far: float = max(
            (m["time"] for m in kept if m["kind"] == "train"), default=0.0
        )
        self._baselines = {m["dataset"] for m in kept if m["kind"] == "baseline"}
        last = [m for m in kept if m["kind"] == "validation" and m["step"] == step]
        self._validated = {step: [m["dataset"] for m in last]}
        self.beside = [m for m in kept if m["kind"] in OF_WATCH]
        path = self._run_dir / "metrics.jsonl"
        self._file.close()
        write_atomically(path, "".join(json.dumps(m) + "\n" for m in kept))
        self._file = _appended(path)

    def start(self, **facts: Any) -> None:
        """Records that training starts or is resumed."""
        self._write({"kind": "start", **facts, "unix_time": clock.time()})

    def validated(self, step: int) -> list[str]:
        """The data sets whose validation of the step that training continues from is recorded."""
        return self._validated.get(step, [])

    def baseline(self, *, dataset: str, unigram_loss: float) -> None:
        """Records the lowest loss of a model without context on a data set, in nats a token.

        Does nothing when it is recorded already.
        """
        if dataset in self._baselines:
            return
        self._baselines.add(dataset)
        self._write({"kind": "baseline", "dataset": dataset, "unigram_loss": unigram_loss})
        self._say(f"{dataset}: entropy of single tokens {unigram_loss:.4f} nats (validation)")

    def train(self, *, eta_s: float, **values: Any) -> None:
        """Records a step; docs/reference/formats.md lists the values.

        Args:
            eta_s: seconds until the last step ends.
        """
        self._write({"kind": "train", **values})
        scalars = ("loss", "grad_norm", "learning_rate", "tokens_per_second", "mfu", "z_loss")
        known = {name: values.get(name) for name in (*scalars, *OF_EXPERTS)}
        self._scalars(
            {f"train/{name}": value for name, value in known.items() if value is not None},
            values["step"],
        )
        self._say(self._line(values, eta_s))

    def validation(
        self, *, step: int, tokens: int, time: float, dataset: str, loss: float, perplexity: float
    ) -> None:
        """Records the validation loss on one data set, in nats a token."""
        values = {"step": step, "tokens": tokens, "time": time, "dataset": dataset}
        self._write({"kind": "validation", **values, "loss": loss, "perplexity": perplexity})
        self._scalars({f"validation/{dataset}": loss}, step)
        self._say(
            f"step {step}: validation loss on {dataset} {loss:.4f} (perplexity {perplexity:.2f})"
        )

    def beside_training(
        self, kind: str, text: str, *, step: int, scalars: dict[str, float], **facts: Any
    ) -> None:
        """Records what has come of a checkpoint beside the training, and prints `text`.

        Args:
            kind: one of OF_WATCH.
            step: the checkpoint's; training has gone on meanwhile.
            scalars: the figures of an evaluation.
            facts: the line's other fields.
        """
        self.note(kind, text, step=step, **facts)
        named = {f"evaluation/{name}": value for name, value in scalars.items()}
        self._to_tensorboard(named, step)
        if self._wandb and named:
            self._wandb.log({**named, "evaluation/step": step})

    def save_failed(self, *, step: int, reason: str) -> None:
        """Records that a checkpoint could not be written."""
        self._write(
            {"kind": "save_failed", "step": step, "unix_time": clock.time(), "reason": reason}
        )

    def note(self, kind: str, text: str, **values: Any) -> None:
        """Records another event as a line of this kind, and prints `text` on the console."""
        self._write({"kind": kind, **values})
        self._say(text)

    def end(self, *, step: int, reason: str) -> None:
        """Records that training ends, and closes all outputs."""
        self._write({"kind": "end", "step": step, "unix_time": clock.time(), "reason": reason})
        self._thread.shutdown()
        self._file.close()
        for stream in filter(None, (sys.stdout, sys.stderr)):
            try:
                stream.flush()
            except OSError:  # else it would change the exit status
                _drop_unwritten(stream)
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()

    def wait(self) -> None:
        """Waits until the thread has written all lines so far."""
        self._thread.submit(int).result()

    def sync(self) -> None:
        """Waits until the lines so far are on disk, as far as it takes them. Any thread may call it."""
        self._thread.submit(self._sync).result()

    def _sync(self) -> None:
        with contextlib.suppress(OSError):  # `_append` says so
            os.fsync(self._file.fileno())

    def _write(self, values: dict[str, Any]) -> None:
        self._thread.submit(self._append, json.dumps(values).encode() + b"\n")

    def _append(self, line: bytes) -> None:
        try:
            self._file.write(line)
        except OSError as error:  # more lines than the file's buffer holds are waiting
            print(f"metrics.jsonl: a line is lost: {error}: {line.decode()}", file=sys.stderr)
            return
        try:
            self._file.flush()
        except OSError as error:
            print(f"metrics.jsonl is not written yet, its lines are kept: {error}", file=sys.stderr)

    def _scalars(self, values: dict[str, float], step: int) -> None:
        self._to_tensorboard(values, step)
        if self._wandb:
            self._wandb.log(values, step=step)

    def _to_tensorboard(self, values: dict[str, float], step: int) -> None:
        if self._tensorboard:
            try:
                for name, value in values.items():
                    self._tensorboard.add_scalar(name, value, step)
            except OSError as error:  # its writer does not recover
                self._tensorboard = None
                with contextlib.suppress(OSError):  # it may go to the same disk
                    print(f"TensorBoard logging stops: {error}", file=sys.stderr)

    def _say(self, text: str) -> None:
        """Prints a line at once. A program that reads it may have ended (`| head`): see `has_reader`. A
        line for which a full disk has no room may be lost: metrics.jsonl has the record."""
        try:
            print(text, flush=True)
        except BrokenPipeError:
            self.has_reader = False
            unread, nowhere = os.fstat(sys.stdout.fileno()), os.open(os.devnull, os.O_WRONLY)
            for stream in (sys.stdout, sys.stderr):
                if os.path.samestat(os.fstat(stream.fileno()), unread):
                    os.dup2(nowhere, stream.fileno())  # so that later lines raise no error
        except OSError:  # the stream keeps some lines, and tries again at the next one
            pass

    def _line(self, values: dict[str, Any], eta_s: float) -> str:
        parts = [
            f"step {values['step']:>{len(str(self._train_steps))}}/{self._train_steps}",
            f"loss {values['loss']:.4f}",
            f"grad norm {values['grad_norm']:.2f}",
            f"lr {values['learning_rate']:.2e}",
            f"{_si(values['tokens_per_second'])} tok/s",
            f"{values['tflops_per_gpu']:.3g} TFLOP/s per rank",
        ]
        if values["mfu"] is not None:
            parts.append(f"MFU {100 * values['mfu']:.1f}%")
        if "mfu_whole_sequences" in values:  # documents are apart
            parts[-1] += f", of whole sequences {100 * values['mfu_whole_sequences']:.1f}%"
        if "z_loss" in values:
            parts.insert(2, f"z-loss {values['z_loss']:.2g}")
        if "expert_imbalance" in values:
            parts.append(f"fullest expert {values['expert_imbalance']:.2f}x the mean")
        if values.get("dropped_share"):
            parts.append(f"dropped {values['dropped_share']:.1%}")
        parts.append(f"mem {values['memory_gib']:.1f} GiB")
        parts.append(f"ETA {in_time(eta_s)}")
        return " | ".join(parts)


def _appended(path: Path) -> BinaryIO:
    """Opens a file to append lines. While the disk is full, lines stay in the file's buffer of 1 MiB."""
    return path.open("ab", buffering=1 << 20)


def _wandb_id(run_dir: Path) -> str:
    """The run's id at W&B, the same at each start: else each would be another run there.

    Raises:
        UserError: RUN/wandb.json holds none.
    """
    path = run_dir / "wandb.json"
    if not path.is_file():
        write_atomically(path, json.dumps({"id": secrets.token_hex(8)}) + "\n")
    found = read_json(path, "a run's id at W&B").get("id")
    if not (isinstance(found, str) and found.isascii() and found.isalnum()):
        raise UserError(f"{path} holds no id of a run at W&B: delete it, and a new one is made")
    return found


def _drop_unwritten(stream: TextIO) -> None:
    """Throws away what a full disk has not taken of a stream: each later flush would fail, too."""
    taken = os.dup(stream.fileno())
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    stream.flush()
    os.dup2(taken, stream.fileno())
    os.close(taken)
    os.close(nowhere)


def _existing(run_dir: Path) -> list[dict[str, Any]]:
    return read_metrics(run_dir) if (run_dir / "metrics.jsonl").is_file() else []


def _is_kept(line: dict[str, Any], resume_step: int) -> bool:
    if resume_step == 0:
        return False  # no checkpoint: the run starts from the beginning
    return line.get("step", 0) <= resume_step


def _si(value: float) -> str:
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.1f}{unit}"
    return f"{value:.0f}"
