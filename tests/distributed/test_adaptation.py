"""A standard or parallel model led to its ladder layers, one after another and by its own predictions, at
every layout as plain PyTorch does it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from torch import Tensor

from megatron_ladder.config import ParallelConfig
from megatron_ladder.losses.distillation import distilled_losses, divergence
from megatron_ladder.mcore_compat import initialize_model_parallel
from pretrain.config.train import AdaptConfig, TrainConfig, save_config
from pretrain.loop.step import train_step, validate
from pretrain.loop.teacher import Teacher
from pretrain.model.gradual import ladder_layers_at, use_ladder_layers
from pretrain.optim.optimizer import gathered_parameters
from pretrain.run.checkpoint import load_initial_weights, model_chunks
from pretrain.run.folder import find_checkpoint
from pretrain.start.initial import original_model
from tests.distributed.layouts import (
    Layout,
    batches,
    configuration,
    micro_batches,
    save_weights,
    start,
)
from tests.oracle import plain_model
from tests.ranks import run_ranks

STEPS, WEIGHT, TEMPERATURE = 5, 0.6, 2.0
LAYOUTS = [
    Layout(accumulation=4),
    Layout(tp=2),
    Layout(tp=2, sp=True, recompute="full"),
    Layout(dp=2),
    Layout(cp=2, accumulation=2),
    Layout(pp=2, vpp=2, accumulation=4),
    Layout(tp=2, sp=True, pp=2, vpp=2, accumulation=4),
]
WITH_EXPERTS = [
    Layout(accumulation=4),
    Layout(dp=2, ep=2),
    Layout(cp=2, ep=2, accumulation=2),
    Layout(pp=2, dp=2, ep=2, accumulation=2),
]


KINDS = {
    "list": "standard",
    "some parallel-ladder": "parallel",
    "list, unbalanced experts": "unbalanced experts",
}
"""What a model becomes, and what it was."""


def base_configuration(kind: str) -> TrainConfig:
    config = configuration(kind)
    return replace(config, data=replace(config.data, paths=(Path("data"),)))


def adapted_configuration(kind: str, layout: Layout, base: Path) -> TrainConfig:
    return replace(
        configuration(kind, layout),
        init_from=base,
        adapt=AdaptConfig(
            gradual_steps=3, distillation_weight=WEIGHT, distillation_temperature=TEMPERATURE
        ),
    )


def save_base(kind: str, folder: Path) -> None:
    config = base_configuration(kind)
    model, _, _ = start(config)
    noise = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model[0].module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=noise))
    checkpoint = folder / "checkpoints" / "step_00000000"
    save_weights(model, checkpoint)
    save_config(config, checkpoint / "config.json")


def adapt(kind: str, layouts: list[Layout], base: Path) -> list[dict[str, list[float]]]:
    """Called on every rank: losses and gradient norms of the steps, and the loss after them."""
    results = []
    for layout in layouts:
        config = adapted_configuration(kind, layout, base)
        model, optimizer, scheduler = start(config)
        teacher = Teacher(config)
        load_initial_weights(find_checkpoint(base), model_chunks(model))
        optimizer.reload_model_params()
        result: dict[str, list[float]] = {"loss": [], "norm": []}
        for step, tokens in enumerate(batches()[:STEPS], start=1):
            use_ladder_layers(model, config, step)
            parts = iter(micro_batches(tokens, config))
            loss, norm, *_ = train_step(
                model, optimizer, scheduler, parts, config, teacher.add_logits
            )
            result["loss"].append(loss)
            result["norm"].append(norm)
        use_ladder_layers(model, config, None)
        with gathered_parameters(model):
            held_out = validate(model, micro_batches(batches()[-1], config), config)
        results.append({**result, "held out": [held_out]})
    return results


def adapt_plainly(config: TrainConfig, base: Path) -> dict[str, list[float]]:
    checkpoint = find_checkpoint(base)
    assert config.init_from is not None
    teacher = plain_model(original_model(config.init_from), checkpoint)
    student = plain_model(config.model, checkpoint)
    o = config.optimizer
    parameters = list(student.parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": o.weight_decay},
            {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
        ],
        lr=o.lr,
        betas=(o.adam_beta1, o.adam_beta2),
        eps=o.adam_eps,
    )

    before, after = teacher.config.residual, student.config.residual

    def become(ladder: list[int]) -> None:
        for number, layer in enumerate(student.model.layers):
            layer.residual = after if number in ladder else before

    def losses(tokens: Tensor) -> tuple[Tensor, Tensor]:
        inputs, labels = tokens[:, :-1], tokens[:, 1:].flatten()
        logits = student(inputs).logits.flatten(0, 1)
        with torch.no_grad():
            wanted = teacher(inputs).logits.flatten(0, 1) / TEMPERATURE
        from_teacher = F.kl_div(
            (logits / TEMPERATURE).log_softmax(-1),
            wanted.log_softmax(-1),
            log_target=True,
            reduction="batchmean",
        )
        cross_entropy = F.cross_entropy(logits, labels)
        trained = (1 - WEIGHT) * cross_entropy + WEIGHT * TEMPERATURE**2 * from_teacher
        return trained, cross_entropy

    result: dict[str, list[float]] = {"loss": [], "norm": []}
    # Four ladder layers over three steps, the last first.
    assert isinstance(config.model.ladder_layers, tuple)
    layers = list(config.model.ladder_layers)[::-1]
    of_steps = [layers[:2], layers[:3], *[layers] * 3]
    for tokens, ladder in zip(batches(), of_steps, strict=False):
        become(ladder)
        optimizer.zero_grad()
        trained, cross_entropy = losses(tokens)
        trained.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, o.clip_grad)
        optimizer.step()
        result["loss"].append(cross_entropy.item())
        result["norm"].append(norm.item())
    with torch.no_grad():
        result["held out"] = [losses(batches()[-1])[1].item()]
    return result


@pytest.mark.parametrize(
    ("kind", "layouts"),
    [
        ("list", LAYOUTS),
        ("some parallel-ladder", [Layout(tp=2, sp=True, recompute="full")]),
        pytest.param("some parallel-ladder", LAYOUTS, marks=pytest.mark.slow),
        ("list, unbalanced experts", [Layout(tp=2, sp=True, ep=2)]),
        pytest.param("list, unbalanced experts", WITH_EXPERTS, marks=pytest.mark.slow),
    ],
)
def test_every_layout_adapts_as_plain_pytorch(
    kind: str, layouts: list[Layout], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    run_ranks(1, save_base, KINDS[kind], base, tmp_path=tmp_path)
    expected = adapt_plainly(adapted_configuration(kind, Layout(), base), base)
    assert expected["loss"][2] < expected["loss"][0]  # the same batch again
    for ranks in sorted({layout.ranks for layout in layouts}):
        some = [layout for layout in layouts if layout.ranks == ranks]
        for results in run_ranks(ranks, adapt, kind, some, base, tmp_path=tmp_path):
            for layout, result in zip(some, results, strict=True):
                for name, values in expected.items():
                    assert result[name] == pytest.approx(values, abs=2e-5), (layout, name)


def divergence_of_a_part(student: Tensor, teacher: Tensor, labels: Tensor) -> list[Tensor]:
    size, rank = dist.get_world_size(), dist.get_rank()
    parallel_state.destroy_model_parallel()
    initialize_model_parallel(ParallelConfig(tensor_model_parallel_size=size), seed=0)
    group = parallel_state.get_tensor_model_parallel_group()
    part = student.chunk(size, -1)[rank].clone().requires_grad_()
    theirs = teacher.chunk(size, -1)[rank].clone().requires_grad_()
    value = divergence(part, theirs, 3.0, group)
    (value * torch.arange(1.0, 1 + value.numel()).view_as(value)).sum().backward()
    assert theirs.grad is None
    trained, cross_entropy = distilled_losses(
        part.detach().clone(), theirs, labels, weight=0.25, temperature=3.0, group=group
    )
    return [value.detach(), part.grad, trained, cross_entropy]


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_divergence_is_torchs(ranks: int, tmp_path: Path) -> None:
    drawn = torch.Generator().manual_seed(0)
    # Large: sums of exponentials must not overflow.
    student, teacher = 30 * torch.randn(2, 2, 3, 8, generator=drawn)
    student.requires_grad_()
    labels = torch.randint(0, 8, (2, 3), generator=drawn)
    right = 9 * F.kl_div(
        (student / 3).log_softmax(-1),
        (teacher / 3).log_softmax(-1),
        log_target=True,
        reduction="none",
    ).sum(-1)
    (right * torch.arange(1.0, 7.0).view(2, 3)).sum().backward()
    cross_entropy = F.cross_entropy(student.flatten(0, 1), labels.flatten(), reduction="none")
    arguments = (student.detach(), teacher, labels)
    found = run_ranks(ranks, divergence_of_a_part, *arguments, tmp_path=tmp_path)
    for value, _, trained, plain in found:
        torch.testing.assert_close(value, right.detach())
        torch.testing.assert_close(plain, cross_entropy.detach().view(2, 3))
        torch.testing.assert_close(trained, 0.75 * plain + 0.25 * value)
    gradient = torch.cat([gradient for _, gradient, _, _ in found], -1)
    torch.testing.assert_close(gradient, student.grad)


def test_layers_are_turned_on_one_after_another() -> None:
    config = adapted_configuration("list", Layout(), Path("base"))
    schedule = replace(config.schedule, train_steps=10)
    config = replace(config, adapt=AdaptConfig(gradual_steps=8), schedule=schedule)
    by_step = [ladder_layers_at(config, step) for step in range(1, 11)]
    assert by_step == [[6], [6], [6, 4], [6, 4], [6, 4, 3], [6, 4, 3], *[[6, 4, 3, 0]] * 4]
    assert ladder_layers_at(config, None) == [6, 4, 3, 0]
    assert ladder_layers_at(replace(config, adapt=AdaptConfig(gradual_steps=1)), 1) == [6, 4, 3, 0]
