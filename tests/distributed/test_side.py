"""Ladder side-tuning at every layout, as plain PyTorch does it by the exported modelling file."""

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_ladder.hf.convert import megatron_to_hf
from megatron_ladder.hf.model_config import to_hf_config
from megatron_ladder.hf.modelling.modeling_ladder import LadderForCausalLM
from megatron_ladder.hf.modelling.modeling_side import LadderSideForCausalLM
from megatron_ladder.side.config import SideConfig
from megatron_ladder.side.prune import magnitudes, prune
from pretrain.config.train import TrainConfig, save_config
from pretrain.loop.log import RunLog
from pretrain.loop.saving import CheckpointSaver
from pretrain.loop.side import fisher, load_backbone
from pretrain.loop.step import train_step, validate
from pretrain.optim.optimizer import gathered_parameters
from pretrain.run.checkpoint import Progress, load_checkpoint, load_weights, model_chunks
from pretrain.run.folder import backbone_of, find_checkpoint, latest_checkpoint
from tests.distributed.layouts import (
    HALVES,
    Layout,
    batches,
    configuration,
    load_start,
    micro_batches,
    save_gradients,
    save_weights,
    start,
)
from tests.gradients import assert_same_gradients
from tests.ranks import run_ranks

STEPS, WHOLE = 4, Layout()
SIDE = SideConfig(reduction=4, dropped_layers=3, start="random")
QKV = {"add_qkv_bias": True, "qk_layernorm": True, "num_query_groups": 2}
LAYOUTS = [
    Layout(accumulation=2),
    Layout(tp=2),
    Layout(tp=2, sp=True),
    Layout(pp=2),
    Layout(pp=2, vpp=2, accumulation=4),
    Layout(dp=2),
]
ALL = [*LAYOUTS, Layout(tp=2, sp=True, pp=2, vpp=2, accumulation=4), Layout(tp=2, pp=2)]


def base_configuration(kind: str, layout: Layout = WHOLE) -> TrainConfig:
    config = configuration(kind, layout)
    return replace(
        config,
        model=replace(config.model, **QKV),
        data=replace(config.data, paths=(Path("data"),)),
    )


def side_configuration(kind: str, layout: Layout, side: SideConfig, folder: Path) -> TrainConfig:
    return replace(
        base_configuration(kind, layout), side=side, init_from=folder / "base", output_dir=folder
    )


def save_base(kind: str, side: SideConfig, folder: Path) -> None:
    """A model to start from, and weights of a side network that every layout begins with."""
    noise = torch.Generator().manual_seed(2)
    config = base_configuration(kind)
    model, _, _ = start(config)
    with torch.no_grad():
        for parameter in model[0].module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=noise))
    checkpoint = folder / "base" / "checkpoints" / "step_00000000"
    save_weights(model, checkpoint)
    save_config(config, checkpoint / "config.json")
    model, _, _ = start(side_configuration(kind, Layout(), side, folder))
    with torch.no_grad():
        for parameter in model[0].module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=noise))
    save_weights(model, folder / "start")


def tune(kind: str, layouts: list[Layout], side: SideConfig, folder: Path) -> list[dict[str, Any]]:
    """Called on every rank: losses and gradient norms of the steps, the loss after them, and its
    gradients of the first step in a folder."""
    results = []
    for number, layout in enumerate(layouts):
        config = side_configuration(kind, layout, side, folder)
        model, optimizer, scheduler = start(config)
        load_backbone(config, model)
        load_start(model, folder / "start")
        optimizer.reload_model_params()
        backbone = [c.backbone for c in model_chunks(model).values()]
        before = [p.clone() for chunk in backbone for p in chunk.parameters()]
        out = folder / f"gradients of {layout.ranks} {number}"

        result: dict[str, Any] = {"loss": [], "norm": [], "gradients": out}

        def before_update(
            *_: Any, model: Any = model, result: dict[str, Any] = result, out: Path = out
        ) -> bool:
            if not result["loss"]:
                save_gradients(model, out)
            return True

        for tokens in batches()[:STEPS]:
            parts = iter(micro_batches(tokens, config))
            loss, norm, *_ = train_step(
                *(model, optimizer, scheduler, parts, config), is_good=before_update
            )
            result["loss"].append(loss)
            result["norm"].append(norm)
        with gathered_parameters(model):
            held_out = validate(model, micro_batches(batches()[-1], config), config)
        # The backbone has its bits, no gradient, and no place in DDP's buffers.
        after = [p for chunk in backbone for p in chunk.parameters()]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        assert all(p.grad is None and not hasattr(p, "main_grad") for p in after)
        ours = {id(p): p.numel() for chunk in model for p in chunk.module.parameters()}
        assert {id(p) for chunk in model for b in chunk.buffers for p in b.params} == ours.keys()
        trained = sum(ours.values())
        assert layout.ranks > 1 or trained == side.num_parameters(config.model)
        results.append({**result, "held out": [held_out]})
    return results


def oracle(config: TrainConfig, folder: Path) -> LadderSideForCausalLM:
    hf = to_hf_config(config.model, side=config.side)
    hf.vocab_size = config.model.padded_vocab_size
    plain = LadderSideForCausalLM(hf).float()
    tensors = load_weights(find_checkpoint(folder / "base")) | load_weights(folder / "start")
    missing, unknown = plain.load_state_dict(dict(megatron_to_hf(tensors, hf)), strict=False)
    assert not unknown and set(missing) <= {"lm_head.weight"}
    plain.tie_weights()
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(".side." in name)
    return plain


def tune_plainly(config: TrainConfig, folder: Path) -> tuple[dict[str, list[float]], dict]:
    plain, o = oracle(config, folder), config.optimizer
    parameters = [p for p in plain.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": o.weight_decay},
            {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
        ],
        lr=o.lr,
        betas=(o.adam_beta1, o.adam_beta2),
        eps=o.adam_eps,
    )

    def loss(tokens: Tensor) -> Tensor:
        return F.cross_entropy(plain(tokens[:, :-1]).logits.flatten(0, 1), tokens[:, 1:].flatten())

    result: dict[str, list[float]] = {"loss": [], "norm": []}
    gradients: dict[str, Tensor] = {}
    for tokens in batches()[:STEPS]:
        optimizer.zero_grad()
        value = loss(tokens)
        value.backward()
        if not gradients:
            gradients = {n: p.grad.clone() for n, p in plain.named_parameters() if p.requires_grad}
        norm = torch.nn.utils.clip_grad_norm_(parameters, o.clip_grad)
        optimizer.step()
        result["loss"].append(value.item())
        result["norm"].append(norm.item())
    with torch.no_grad():
        result["held out"] = [loss(batches()[-1]).item()]
    return result, gradients


@pytest.mark.parametrize(
    ("kind", "layouts", "side"),
    [
        ("ladder", LAYOUTS, SIDE),
        ("standard", [Layout(tp=2), Layout(pp=2)], SIDE),
        ("parallel", [Layout(tp=2, sp=True)], replace(SIDE, dropped_layers=(0, 2))),
        ("standard in halves", [Layout(tp=2, sp=True)], SIDE),
        *(
            pytest.param(kind, ALL, SIDE, marks=pytest.mark.slow)
            for kind in ("standard", "list", "parallel", "parallel-ladder", *HALVES)
        ),
    ],
)
def test_every_layout_tunes_as_plain_pytorch(
    kind: str, layouts: list[Layout], side: SideConfig, tmp_path: Path
) -> None:
    run_ranks(1, save_base, kind, side, tmp_path, tmp_path=tmp_path)
    config = side_configuration(kind, Layout(), side, tmp_path)
    expected, gradients = tune_plainly(config, tmp_path)
    assert expected["loss"][2] < expected["loss"][0]  # the same batch again
    base = load_weights(find_checkpoint(tmp_path / "base"))
    hf = to_hf_config(config.model, side=side)
    for ranks in sorted({layout.ranks for layout in layouts}):
        some = [layout for layout in layouts if layout.ranks == ranks]
        for results in run_ranks(ranks, tune, kind, some, side, tmp_path, tmp_path=tmp_path):
            for layout, result in zip(some, results, strict=True):
                for name, values in expected.items():
                    assert result[name] == pytest.approx(values, abs=2e-5), (layout, name)
        for layout, result in zip(some, results, strict=True):
            found = megatron_to_hf(base | load_weights(result["gradients"]), hf)
            assert_same_gradients(found, gradients, layout, atol=1e-5)


def resume(layout: Layout, folder: Path) -> list[list[Tensor]]:
    """Four steps at once; and two steps, a checkpoint, and the other two from it."""
    config = replace(side_configuration("ladder", layout, SIDE, folder), tensorboard=False)
    ends = []
    for is_resumed in (False, True):
        model, optimizer, scheduler = start(config)
        load_backbone(config, model)
        if is_resumed:
            checkpoint = latest_checkpoint(folder)
            assert checkpoint is not None
            assert load_checkpoint(checkpoint, model, optimizer, scheduler).step == 2
        else:
            load_start(model, folder / "start")
            optimizer.reload_model_params()
        for step, tokens in list(enumerate(batches()[:STEPS], start=1))[2 * is_resumed :]:
            train_step(*(model, optimizer, scheduler, iter(micro_batches(tokens, config)), config))
            if step == 2:
                with gathered_parameters(model):
                    saver = CheckpointSaver(config, Mock(spec=RunLog))
                    progress = Progress(step, step * config.global_batch_size)
                    saver.save(progress, model, optimizer, scheduler, wait=True)
        with gathered_parameters(model):
            ends.append([p.detach().clone() for chunk in model for p in chunk.parameters()])
    return ends


@pytest.mark.parametrize(
    "layout",
    [
        *(pytest.param(x, marks=pytest.mark.slow) for x in (Layout(tp=2, sp=True), Layout(dp=2))),
        Layout(pp=2),
    ],
    ids=str,
)
def test_a_resumed_run_is_the_same_bit_by_bit(layout: Layout, tmp_path: Path) -> None:
    run_ranks(1, save_base, "ladder", SIDE, tmp_path, tmp_path=tmp_path)
    for whole, resumed in run_ranks(2, resume, layout, tmp_path, tmp_path=tmp_path):
        assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))
    # The checkpoint holds the side network alone; the backbone is kept once, as links.
    checkpoint = latest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert all(name.startswith("side.") for name in load_weights(checkpoint))
    kept, theirs = (find_checkpoint(f) for f in (backbone_of(tmp_path), tmp_path / "base"))
    assert {f.stat().st_ino for f in kept.iterdir()} == {f.stat().st_ino for f in theirs.iterdir()}


def prune_at(kind: str, layouts: list[Layout], by: str, folder: Path) -> list[dict[str, Tensor]]:
    """Called on every rank: the side network's first weights, as whole tensors."""
    results = []
    for number, layout in enumerate(layouts):
        config = side_configuration(kind, layout, SIDE, folder)
        model, _, _ = start(config)
        load_backbone(config, model)
        chunks = list(model_chunks(model).values())
        if by == "fisher":
            # The gradients are those of the loss alone.
            optimizer = replace(config.optimizer, z_loss_coeff=0.1)
            trained = replace(config, optimizer=optimizer)
            importance = fisher(chunks, micro_batches(batches()[0], config), trained)
        else:
            importance = magnitudes(chunks)
        prune(chunks, importance)
        assert not any(p.requires_grad for c in chunks for p in c.backbone.parameters())
        out = folder / f"pruned at {layout.ranks} {number}"
        save_weights(model, out)
        dist.barrier()
        results.append(load_weights(out))
    return results


def prune_plainly(config: TrainConfig, by: str, folder: Path) -> dict[str, Tensor]:
    """The same by Hugging Face's tensors: what a channel's weights have of importance, summed up."""
    hf = to_hf_config(config.model)
    hf.vocab_size = config.model.padded_vocab_size
    plain = LadderForCausalLM(hf).float()
    base = load_weights(find_checkpoint(folder / "base"))
    plain.load_state_dict(dict(megatron_to_hf(base, hf)), strict=False)
    plain.tie_weights()
    scores = {n: torch.zeros_like(p) for n, p in plain.named_parameters()}
    if by == "magnitude":
        scores = {n: p.detach().abs() for n, p in plain.named_parameters()}
    else:
        for part in batches()[0].split(config.micro_batch_size):
            plain.zero_grad()
            logits = plain(part[:, :-1]).logits
            F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten()).backward()
            for name, parameter in plain.named_parameters():
                scores[name] += parameter.grad**2
    weights = {n: p.detach() for n, p in plain.named_parameters()}
    r, d, h = SIDE.reduction, hf.head_dim, hf.hidden_size
    assert r is not None

    def layer(tensors: dict[str, Tensor], number: int, name: str) -> Tensor:
        return tensors[f"model.layers.{number}.{name}.weight"]

    reads = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    reads += ("mlp.gate_proj", "mlp.up_proj")
    states = torch.zeros(h)
    for number in range(hf.num_hidden_layers):
        states += sum(layer(scores, number, name).sum(0) for name in reads)
        states += layer(scores, number, "self_attn.o_proj").sum(1)
        states += layer(scores, number, "mlp.down_proj").sum(1)
    keep = states.argsort()[-h // r :].sort().values
    expected = {"model.side.first.weight": torch.eye(h)[keep]}
    expected["model.side.up.weight"] = torch.eye(h)[keep].t()
    for place, number in enumerate(SIDE.kept_layers(hf.num_hidden_layers)):
        q, k, v, gate, up = (layer(scores, number, name) for name in reads)
        o, down = layer(scores, number, "self_attn.o_proj"), layer(scores, number, "mlp.down_proj")
        turned = (q.sum(1).view(-1, d).sum(0) + k.sum(1).view(-1, d).sum(0)).view(2, -1).sum(0)
        pairs = turned.argsort()[-d // r // 2 :].sort().values
        pairs = torch.cat((pairs, pairs + d // 2))
        values = v.sum(1).view(-1, d).sum(0) + o.sum(0).view(-1, d).sum(0)
        values = values.argsort()[-d // r :].sort().values
        mlp = (gate.sum(1) + up.sum(1) + down.sum(0)).view(-1, r)
        mlp = mlp.argmax(1) + torch.arange(len(mlp)) * r
        own = f"model.side.blocks.{place}."
        expected |= {own + "gate": torch.zeros(1), own + "down.weight": torch.eye(h)[keep]}
        for one, rows in (("q", pairs), ("k", pairs), ("v", values)):
            weight = layer(weights, number, f"self_attn.{one}_proj").unflatten(0, (-1, d))
            expected[f"{own}layer.self_attn.{one}_proj.weight"] = weight[:, rows].flatten(0, 1)[
                :, keep
            ]
            bias = weights[f"model.layers.{number}.self_attn.{one}_proj.bias"].unflatten(0, (-1, d))
            expected[f"{own}layer.self_attn.{one}_proj.bias"] = bias[:, rows].flatten()
            if one != "v":
                norm = layer(weights, number, f"self_attn.{one}_norm")
                expected[f"{own}layer.self_attn.{one}_norm.weight"] = norm[rows]
        weight = layer(weights, number, "self_attn.o_proj")[keep].unflatten(1, (-1, d))
        expected[f"{own}layer.self_attn.o_proj.weight"] = weight[:, :, values].flatten(1)
        for one in ("gate", "up"):
            weight = layer(weights, number, f"mlp.{one}_proj")
            expected[f"{own}layer.mlp.{one}_proj.weight"] = weight[mlp][:, keep]
        weight = layer(weights, number, "mlp.down_proj")[keep]
        expected[f"{own}layer.mlp.down_proj.weight"] = weight[:, mlp]
        first = layer(weights, number, "input_layernorm")[keep]
        second = weights.get(f"model.layers.{number}.post_attention_layernorm.weight")
        expected[f"{own}layer.input_layernorm.weight"] = first
        expected[f"{own}layer.post_attention_layernorm.weight"] = (
            first if second is None else second[keep]
        )
    return expected


@pytest.mark.parametrize(
    ("kind", "by", "layouts"),
    [
        ("ladder", "fisher", [Layout(tp=2), Layout(pp=2), Layout(tp=2, sp=True)]),
        ("parallel", "magnitude", [Layout(tp=2)]),
        *(
            pytest.param(kind, "fisher", ALL, marks=pytest.mark.slow)
            for kind in ("standard", "list", "parallel-ladder", *HALVES)
        ),
    ],
)
def test_pruning_is_the_same_at_every_layout(
    kind: str, by: str, layouts: list[Layout], tmp_path: Path
) -> None:
    run_ranks(1, save_base, kind, SIDE, tmp_path, tmp_path=tmp_path)
    config = side_configuration(kind, Layout(), SIDE, tmp_path)
    base = load_weights(find_checkpoint(tmp_path / "base"))
    hf = to_hf_config(config.model, side=SIDE)
    for ranks in sorted({layout.ranks for layout in layouts}):
        some = [layout for layout in layouts if layout.ranks == ranks]
        for layout, pruned in zip(
            some,
            run_ranks(ranks, prune_at, kind, some, by, tmp_path, tmp_path=tmp_path)[0],
            strict=True,
        ):
            size = side_configuration(kind, layout, SIDE, tmp_path)
            expected = prune_plainly(size, by, tmp_path)
            found = dict(megatron_to_hf(base | pruned, hf))
            assert {name for name in found if ".side." in name} == expected.keys()
            for name, weight in expected.items():
                assert torch.equal(found[name], weight), (layout, name)
