"""Residual scaling: how do states grow with depth, and how do models with it learn?

    python benchmarks/depth/residual_scaling.py --data DATA --json FILE --picture FILE

All of it runs in the oracle (hf/modelling/modeling_ladder.py), which the tests hold the training code to.

Growth is measured at initialisation, on random tokens: the size of the residual stream after the last layer
over the embedding's. All weights are drawn with the standard deviation 1/sqrt(hidden size), embeddings
with 1. Two predictions stand beside it:

- From the first layer of the model without scaling alone. c_a and c_m are the sizes of what its attention
  and its MLP add, over the embedding's; all n sub-modules are like these two, and independent. With norms
  an output is as large in every layer: sqrt(1 + n/2 s^2 (c_a^2 + c_m^2)), with the scale s. Without norms
  it grows with the stream, and the expansion has terms of all orders:
  sqrt((1 + s^2 c_a^2) (1 + s^2 c_m^2))^(n/2).
- From the size of each output, as `report depth` does: the product of sqrt(1 + c_i^2).

Then each scaling is trained, with and without norms in the layers, by AdamW in plain PyTorch: on the same
tokens in the same order for each seed. Initial weights are those of `megatron-ladder train`: without
scaling the last linears of sub-modules are divided by sqrt(n). FILE is written after each step of this, and
the same command goes on from there: remove it to begin anew.
"""

import argparse
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]  # where `measuring` is

import numpy as np  # noqa: E402
import torch  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from torch import Tensor  # noqa: E402

from measuring import facts  # noqa: E402
from measuring.learning.runs import data_facts, mean_and_spread  # noqa: E402
from measuring.options import parser_of  # noqa: E402
from measuring.pictures import plain, save  # noqa: E402
from megatron_ladder.config import PARALLEL  # noqa: E402
from megatron_ladder.hf.modelling.configuration_ladder import SCALINGS, LadderConfig  # noqa: E402
from megatron_ladder.hf.modelling.modeling_ladder import LadderForCausalLM  # noqa: E402
from pretrain.data.folders import open_folder  # noqa: E402
from pretrain.data.sample import sample_sequences  # noqa: E402
from pretrain.depth.growth import measure_growth  # noqa: E402
from pretrain.depth.states import run  # noqa: E402
from pretrain.pictures import COLOURS  # noqa: E402

NORMS = {"norms": True, "no norms": False}
VOCAB, BATCH, LENGTH = 512, 4, 64  # of tokens to measure growth on


def arguments() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--picture", type=Path, help="PNG")
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 32, 64])
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--kinds", nargs="+", default=["standard", "ladder", "parallel"])
    parser.add_argument("--draws", type=int, default=1, help="models of each kind; default 1")
    parser.add_argument("--data", type=Path, help="a data set to train on; without it, no training")
    parser.add_argument("--kind", default="ladder", help="to train; default ladder")
    parser.add_argument("--train-layers", type=int, default=8)
    parser.add_argument("--train-hidden-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--sequences", type=int, default=8, help="in a step; default 8")
    parser.add_argument("--seq-length", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3, help="the peak; default 2e-3")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    return parser.parse_args()


def config_of(
    kind: str, scaling: str, norms: bool, layers: int, hidden: int, vocab: int, std: float
) -> LadderConfig:
    return LadderConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        initializer_range=std,
        tie_word_embeddings=True,
        residual=kind,
        residual_scaling=scaling,
        layer_norms=norms,
    )


def model_of(
    kind: str, scaling: str, norms: bool, layers: int, hidden: int, seed: int
) -> LadderForCausalLM:
    """A model with new weights, to measure its growth."""
    torch.manual_seed(seed)
    config = config_of(kind, scaling, norms, layers, hidden, VOCAB, hidden**-0.5)
    model = LadderForCausalLM(config).eval().requires_grad_(False)
    model.model.embed_tokens.weight.mul_(hidden**0.5)
    return model


def tokens_of(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, (BATCH, LENGTH + 1), generator=generator)


def first_layer(model: LadderForCausalLM, sequences: Tensor) -> tuple[float, float]:
    """The mean squares of c_a and c_m of the first layer; see the top of this file."""
    squares = []
    for sequence in sequences:
        seen = run(model, sequence[:-1])
        size = seen.states[0].norm(dim=-1)
        squares.append([(x[0].norm(dim=-1) / size).square() for x in (seen.attention, seen.mlp)])
    attention, mlp = zip(*squares, strict=True)
    return torch.cat(attention).mean().item(), torch.cat(mlp).mean().item()


def expected(first: tuple[float, float], scale: float, norms: bool, kind: str, n: int) -> float:
    """The growth predicted from the first layer alone, over n sub-modules."""
    attention, mlp = (scale**2 * square for square in first)
    if norms:
        return math.sqrt(1 + n / 2 * (attention + mlp))
    a_layer = 1 + attention + mlp if kind in PARALLEL else (1 + attention) * (1 + mlp)
    return math.exp(n / 4 * math.log(a_layer))


def grown(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each kind, with and without norms, scaling and depth."""
    rows = []
    for kind in options.kinds:
        for about_norms, norms in NORMS.items():
            for scaling in SCALINGS:
                for layers in options.layers:
                    rows.append(grown_once(options, kind, norms, scaling, layers))
                    rows[-1]["about_norms"] = about_norms
    return rows


def grown_once(
    options: argparse.Namespace, kind: str, norms: bool, scaling: str, layers: int
) -> dict[str, Any]:
    """The growth, measured and predicted: geometric means over draws of weights and tokens."""
    logs: dict[str, list[float]] = {"measured": [], "first_layer": [], "each_output": []}
    for seed in range(options.draws):
        shape = (norms, layers, options.hidden_size, seed)
        model, sequences = model_of(kind, scaling, *shape), tokens_of(seed)
        first = first_layer(model_of(kind, "none", *shape), sequences)
        found = measure_growth(model, sequences)
        scale = model.config.residual_scale() or 0.0  # learned scales start at zero
        logs["measured"].append(math.log(found.measured[-1]))
        logs["each_output"].append(math.log(found.independent[-1]))
        logs["first_layer"].append(math.log(expected(first, scale, norms, kind, 2 * layers)))
    means = {name: statistics.fmean(values) for name, values in logs.items()}
    return {
        **{"kind": kind, "norms": norms, "scaling": scaling, "layers": layers},
        **{n: math.exp(m) if math.isfinite(m) and m < 700 else None for n, m in means.items()},
    }


class Text:
    """Training and validation sequences of a data set, int64 [count, length + 1]."""

    def __init__(self, path: Path, length: int) -> None:
        folder = open_folder(path)
        self.vocab_size: int = folder.tokenizer["vocab_size"]
        self._length = length
        file = folder.prefix("train") + ".bin"
        self._tokens = np.memmap(file, dtype=folder.manifest["dtype"], mode="r")
        self.validation = sample_sequences(folder, 64, length)

    def drawn(self, count: int, generator: torch.Generator) -> Tensor:
        most = len(self._tokens) - self._length - 1
        starts = torch.randint(0, most, (count,), generator=generator).tolist()
        rows = [self._tokens[s : s + self._length + 1].astype(np.int64) for s in starts]
        return torch.from_numpy(np.stack(rows))


def trained_once(
    options: argparse.Namespace, text: Text, scaling: str, norms: bool, seed: int
) -> dict[str, Any]:
    """One run: its losses in nats a token, and the processor's seconds. It ends at a loss of NaN."""
    torch.manual_seed(seed)
    shape = (options.train_layers, options.train_hidden_size, text.vocab_size, 0.02)
    model = LadderForCausalLM(config_of(options.kind, scaling, norms, *shape))
    if scaling == "none":  # as megatron-core's initial weights
        layers: Any = model.model.layers
        for layer in layers:
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                linear.weight.data /= math.sqrt(2 * options.train_layers)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(seed)
    warm_up, steps, began = max(1, options.steps // 10), options.steps, time.process_time()
    losses: dict[str, list[float | None]] = {"training": [], "validation": []}
    at: list[int] = []
    for step in range(1, steps + 1):
        over = math.pi * max(0, step - warm_up) / max(1, steps - warm_up)
        share = min(step / warm_up, 0.1 + 0.45 * (1 + math.cos(over)))
        for group in optimizer.param_groups:
            group["lr"] = options.lr * share
        ids = text.drawn(options.sequences, generator)
        loss = model(ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        value = loss.item()
        if not math.isfinite(value):
            losses["training"].append(None)  # JSON has no NaN
            break
        losses["training"].append(round(value, 5))
        if step % max(1, steps // 4) == 0 or step == steps:
            at.append(step)
            with torch.no_grad():
                held_out = model(text.validation, labels=text.validation, use_cache=False).loss
            losses["validation"].append(round(held_out.item(), 5))
    scales = [p.tolist() for n, p in model.named_parameters() if "residual_scales" in n]
    return {
        **{"scaling": scaling, "norms": norms, "seed": seed, "steps": at, **losses},
        "scales": [[round(x, 5) for x in layer] for layer in scales],
        "seconds": round(time.process_time() - began, 1),
    }


def trained(options: argparse.Namespace, result: dict[str, Any]) -> None:
    """Adds the runs to the result: each scaling with the first seed before any has the second."""
    text = Text(options.data, options.seq_length)
    runs = result["runs"]
    done = {(r["scaling"], r["norms"], r["seed"]) for r in runs}
    for seed in options.seeds:
        for norms in NORMS.values():
            for scaling in SCALINGS:
                if (scaling, norms, seed) not in done:
                    runs.append(trained_once(options, text, scaling, norms, seed))
                    print(scaling, norms, seed, runs[-1]["validation"][-1:], flush=True)
                    facts.write(options.json, result)


def growth_table(rows: list[dict[str, Any]]) -> str:
    def number(value: float | None) -> str:
        return "overflows" if value is None else f"{value:.3g}"

    titles = [
        "kind",
        "",
        "scaling",
        "layers",
        "measured",
        "from the first layer",
        "from each output",
    ]
    lines = [
        [row["kind"], row["about_norms"], row["scaling"], str(row["layers"])]
        + [number(row[name]) for name in ("measured", "first_layer", "each_output")]
        for row in rows
    ]
    return facts.markdown(titles, lines)


def last_losses(runs: list[dict[str, Any]], norms: bool, scaling: str) -> list[float | None]:
    """The validation loss at the end of each seed; None for a run that ended at NaN."""
    of = [r for r in runs if (r["norms"], r["scaling"]) == (norms, scaling)]
    good = [r["training"][-1] is not None for r in of]
    return [r["validation"][-1] if g else None for r, g in zip(of, good, strict=True)]


def learning_table(runs: list[dict[str, Any]], seeds: list[int]) -> str:
    lines = []
    for about, norms in NORMS.items():
        for scaling in SCALINGS:
            losses = last_losses(runs, norms, scaling)
            good = [loss for loss in losses if loss is not None]
            mean = f"{statistics.fmean(good):.4f}" if len(good) == len(losses) > 0 else "NaN"
            each = ["NaN" if loss is None else f"{loss:.4f}" for loss in losses]
            lines.append([about, scaling, *each, *[""] * (len(seeds) - len(each)), mean])
    return facts.markdown(["", "scaling", *(f"seed {s}" for s in seeds), "mean"], lines)


def draw(
    growth: list[dict[str, Any]], runs: list[dict[str, Any]], kind: str, layers: list[int]
) -> Figure:
    """Growth of one kind against depth, with and without norms; validation losses against tokens."""
    figure = Figure(figsize=(12.5, 8.4 if runs else 4.4), layout="constrained")
    panels = figure.subplots(2 if runs else 1, 2, squeeze=False)
    for axes, (about_norms, norms) in zip(panels[0], NORMS.items(), strict=True):
        for colour, scaling in zip(COLOURS, SCALINGS, strict=False):
            of = [
                r for r in growth if (r["kind"], r["norms"], r["scaling"]) == (kind, norms, scaling)
            ]
            for name, style in (("measured", "o-"), ("first_layer", "--")):
                values = [math.nan if r[name] is None else r[name] for r in of]
                label = scaling if name == "measured" else None
                axes.plot(layers, values, style, color=colour, label=label)
        axes.set(xscale="log", yscale="log", xlabel="layers")
        axes.set_xticks(layers, [str(count) for count in layers])
        axes.minorticks_off()
        axes.set_ylabel("stream over embedding")
        axes.set_title(
            f"{kind}, {about_norms}: measured (points), from the first layer (dashed)", fontsize=10
        )
        axes.legend(frameon=False, fontsize=9)
        plain(axes)
    for axes, (about_norms, norms) in zip(panels[1] if runs else (), NORMS.items(), strict=False):
        for colour, scaling in zip(COLOURS, SCALINGS, strict=False):
            of = [r for r in runs if (r["norms"], r["scaling"]) == (norms, scaling)]
            if not of or None in last_losses(runs, norms, scaling):
                continue
            curves = [dict(zip(r["steps"], r["validation"], strict=True)) for r in of]
            steps, mean, low, high = mean_and_spread(curves)
            axes.plot(steps, mean, "o-", color=colour, label=f"{scaling}: {mean[-1]:.3f}")
            axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
        axes.set(xlabel="steps", ylabel="validation loss, nats a token")
        axes.set_title(f"trained, {about_norms}: mean and range of seeds", fontsize=10)
        axes.legend(frameon=False, fontsize=9)
        plain(axes)
    return figure


def main() -> int:
    options = arguments()
    torch.set_num_threads(1)
    result = facts.header("cpu", options)
    begun: dict[str, Any] = {}
    if options.json and options.json.is_file():
        begun = json.loads(options.json.read_text())
    result |= {"growth": begun.get("growth") or grown(options), "runs": begun.get("runs", [])}
    facts.write(options.json, result)
    print(growth_table(result["growth"]), flush=True)
    if options.data:
        result["data"] = data_facts(options.data)
        trained(options, result)
        print(learning_table(result["runs"], options.seeds), flush=True)
    facts.write(options.json, result)
    if options.picture:
        figure = draw(result["growth"], result["runs"], options.kinds[0], options.layers)
        save(options.picture, figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
