"""Runs the same six steps at one layout; called on every rank."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed.param_and_grad_buffer import shard_buffer
from torch import Tensor

from megatron_ladder.config import ModelConfig, ParallelConfig
from megatron_ladder.fields.experts import ExpertsConfig
from megatron_ladder.mcore_compat import initialize_model_parallel
from pretrain.config.data import DataConfig
from pretrain.config.optimizer import OptimizerConfig
from pretrain.config.schedule import ScheduleConfig
from pretrain.config.train import TrainConfig
from pretrain.loop.log import RunLog
from pretrain.loop.saving import CheckpointSaver
from pretrain.loop.step import train_step, validate
from pretrain.model.setup import build
from pretrain.optim.optimizer import gathered_parameters
from pretrain.run.checkpoint import Progress, load_checkpoint
from pretrain.run.folder import latest_checkpoint

STEPS, BATCH, LENGTH, VOCAB = 6, 8, 16, 100

KINDS = {
    "standard": {"residual": "standard"},
    "parallel": {"residual": "parallel"},
    "ladder": {"residual": "ladder"},
    "last-n": {"residual": "ladder", "ladder_layers": 4},
    "list": {"residual": "ladder", "ladder_layers": (0, 3, 4, 6)},
    "desync": {"residual": "desync", "desync_interval": 3},
    "parallel-ladder": {"residual": "parallel-ladder"},
    "windows, yarn": {
        "residual": "ladder",
        "ladder_layers": (0, 3, 4, 6),
        "sliding_window": 5,
        "sliding_window_layers": 4,
        "rope_scaling_type": "yarn",
        "rope_scaling_factor": 4.0,
    },
    "some parallel-ladder": {"residual": "parallel-ladder", "ladder_layers": (1, 2, 5, 7)},
    "ladder by skipinit": {"residual": "ladder", "residual_scaling": "skipinit"},
    "list by 1/n": {"residual": "ladder", "ladder_layers": (0, 3, 4, 6), "residual_scaling": "1/n"},
    "standard by skipinit": {"residual": "standard", "residual_scaling": "skipinit"},
    "parallel by 1/sqrt-n": {"residual": "parallel", "residual_scaling": "1/sqrt-n"},
    "desync by skipinit": {
        "residual": "desync",
        "desync_interval": 3,
        "residual_scaling": "skipinit",
    },
    "parallel-ladder by skipinit": {
        "residual": "parallel-ladder",
        "residual_scaling": "skipinit",
    },
    "ladder without norms": {
        "residual": "ladder",
        "residual_scaling": "1/sqrt-n",
        "layer_norms": False,
    },
    "parallel without norms": {
        "residual": "parallel",
        "residual_scaling": "skipinit",
        "layer_norms": False,
    },
}
FOUR = ExpertsConfig(num_moe_experts=4, moe_ffn_hidden_size=24)
EXPERTS = {
    "experts": FOUR,
    "a shared expert": replace(FOUR, moe_shared_expert_intermediate_size=40),
    "capacity": replace(FOUR, moe_expert_capacity_factor=0.75),
    "capacity, padded": replace(
        FOUR, moe_expert_capacity_factor=1.0, moe_pad_expert_input_to_capacity=True
    ),
    "expert bias": replace(
        FOUR,
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        moe_router_bias_update_rate=0.01,
        moe_router_load_balancing_type="none",
    ),
    "experts in the first half": replace(FOUR, moe_layer_freq=(1, 1, 0, 0)),
    "one expert, some MLPs": replace(
        FOUR,
        moe_router_topk=1,
        moe_router_pre_softmax=True,
        moe_layer_freq=(0, 1, 1, 0),
        moe_router_load_balancing_type="aux_loss",
    ),
}
"""Mixtures of experts."""
OF_EXPERTS = {
    kind: {"residual": "standard", "num_layers": 4, "experts": experts}
    for kind, experts in EXPERTS.items()
}
LADDER_EXPERTS = {f"ladder, {kind}": {**OF_EXPERTS[kind], "residual": "ladder"} for kind in EXPERTS}
LADDER_EXPERTS["hybrid, a shared expert"] = {
    **LADDER_EXPERTS["ladder, a shared expert"],
    "ladder_layers": (1, 2),
}
PARALLEL_EXPERTS = {
    f"{residual}, {kind}": {**OF_EXPERTS[kind], "residual": residual}
    for residual in ("parallel", "parallel-ladder")
    for kind in ("experts", "a shared expert", "capacity, padded", "one expert, some MLPs")
}
PARALLEL_EXPERTS["some parallel-ladder, a shared expert"] = {
    **PARALLEL_EXPERTS["parallel-ladder, a shared expert"],
    "ladder_layers": (0, 2, 3),
}
SCALED_EXPERTS: dict[str, Any] = {
    "standard experts by 1/sqrt-n": {**OF_EXPERTS["experts"], "residual_scaling": "1/sqrt-n"},
    "ladder experts by skipinit": {
        **LADDER_EXPERTS["ladder, a shared expert"],
        "residual_scaling": "skipinit",
    },
    "parallel-ladder experts without norms": {
        **PARALLEL_EXPERTS["parallel-ladder, a shared expert"],
        "residual_scaling": "skipinit",
        "layer_norms": False,
    },
}
OF_EXPERTS |= LADDER_EXPERTS | PARALLEL_EXPERTS | SCALED_EXPERTS
UNBALANCED_EXPERTS: dict[str, Any] = {
    "unbalanced experts": {
        **OF_EXPERTS["experts"],
        "experts": replace(FOUR, moe_router_load_balancing_type="none"),
    }
}
UNBALANCED_EXPERTS["list, unbalanced experts"] = {
    **UNBALANCED_EXPERTS["unbalanced experts"],
    "residual": "ladder",
    "ladder_layers": (0, 1, 2, 3),
}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "muon": {"optimizer": "muon"},
    "z-loss": {"z_loss_coeff": 1e-2},
    "adam": {},
    "muon, z-loss": {"optimizer": "muon", "z_loss_coeff": 1e-2},
}
"""Of a ladder model whose query heads share keys and values, with biases and learned scales."""
# Kinds that also run in halves.
HALVES = {
    "standard in halves": "standard",
    "parallel in halves": "parallel",
    "standard by skipinit in halves": "standard by skipinit",
}


@dataclass(frozen=True)
class Layout:
    """How the steps are cut."""

    tp: int = 1
    sp: bool = False
    pp: int = 1
    vpp: int | None = None
    dp: int = 1
    cp: int = 1
    ep: int = 1
    first: int | None = None
    recompute: str = "none"
    accumulation: int = 1

    @property
    def ranks(self) -> int:
        return self.tp * self.pp * self.dp * self.cp


def fields_of(kind: str) -> dict[str, Any]:
    """What the kind has besides, of ModelConfig's fields."""
    if kind in OPTIMIZERS:
        scaled = {"residual_scaling": "skipinit", "add_qkv_bias": True}
        return {"residual": "ladder", "num_layers": 4, "num_query_groups": 2, **scaled}
    return (OF_EXPERTS | UNBALANCED_EXPERTS).get(kind) or KINDS[HALVES.get(kind, kind)]


def configuration(kind: str, layout: Layout = Layout()) -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(
            hidden_size=32,
            ffn_hidden_size=48,
            num_attention_heads=4,
            vocab_size=VOCAB,
            max_position_embeddings=LENGTH,
            init_method_std=0.1,
            **({"num_layers": 8} | fields_of(kind)),
        ),
        data=DataConfig(seq_length=LENGTH),
        # Adam divides by |gradient| + eps: a small eps would make rounding errors of gradients
        # near zero as large as the others.
        # Gradients without norms are small: they too are to be clipped.
        optimizer=OptimizerConfig(
            lr=3e-3,
            adam_eps=1e-4,
            clip_grad=0.3 if "without norms" in kind else 1.0,
            **OPTIMIZERS.get(kind, {}),
        ),
        schedule=ScheduleConfig(train_steps=STEPS, min_lr_fraction=1.0),
        parallel=ParallelConfig(
            tensor_model_parallel_size=layout.tp,
            sequence_parallel=layout.sp,
            pipeline_model_parallel_size=layout.pp,
            virtual_pipeline_model_parallel_size=layout.vpp,
            num_layers_in_first_pipeline_stage=layout.first,
            context_parallel_size=layout.cp,
            expert_model_parallel_size=layout.ep,
            tp_overlap="halves" if kind in HALVES and layout.tp > 1 else "none",
        ),
        micro_batch_size=BATCH // layout.dp // layout.accumulation,
        global_batch_size=BATCH,
        recompute=layout.recompute,
    )


def batches() -> list[Tensor]:
    """Of each step: [BATCH, LENGTH + 1] tokens, two batches in turn; one more for validation."""
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randint(0, VOCAB, (3, BATCH, LENGTH + 1), generator=generator)
    # A sequence that begins with one token twice has two states that differ by rounding alone. Which of the
    # two an expert drops would be chance.
    drawn[..., 1] += drawn[..., 1] == drawn[..., 0]
    first, second, held_out = drawn % VOCAB
    return [first, second] * (STEPS // 2) + [held_out]


def micro_batches(tokens: Tensor, config: TrainConfig) -> list[dict[str, Tensor]]:
    """This data-parallel rank's part of one step."""
    rank = parallel_state.get_data_parallel_rank()
    size = parallel_state.get_data_parallel_world_size()
    mine, length = tokens.chunk(size)[rank], tokens.shape[1] - 1
    return [
        {
            "tokens": part[:, :-1],
            "labels": part[:, 1:],
            "loss_mask": torch.ones(part.shape[0], length),
            "position_ids": torch.arange(length).expand(part.shape[0], -1),
        }
        for part in mine.split(config.micro_batch_size)
    ]


def start(config: TrainConfig) -> tuple[list[Any], Any, Any]:
    parallel_state.destroy_model_parallel()
    initialize_model_parallel(config.parallel, config.seed)
    return build(config)


def save_start(kind: str, folder: Path) -> None:
    """Weights that every layout begins with. Norms start as ones, which would hide a wrong one, and learned
    scales at zero, which would hide all layers."""
    model, _, _ = start(configuration(kind))
    noise = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model[0].module.named_parameters():
            if "scales" in name:
                parameter.fill_(0.5)
            if "norm" in name or "scales" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=noise))
    save_weights(model, folder)


def save_weights(model: list[Any], folder: Path) -> None:
    if dist.get_rank() == 0:
        folder.mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save(_sharded(model), str(folder))


def _sharded(model: list[Any]) -> dict[str, Any]:
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(True)}
    return {
        f"model{i}": c.module.sharded_state_dict(metadata=metadata) for i, c in enumerate(model)
    }


def load_start(model: list[Any], folder: Path) -> None:
    loaded = dist_checkpointing.load(_sharded(model), str(folder))
    for i, chunk in enumerate(model):
        chunk.module.load_state_dict(loaded[f"model{i}"])


def save_gradients(model: list[Any], folder: Path) -> None:
    """Saves the gradients of a finished backward as if they were the weights."""
    everyone = parallel_state.get_data_parallel_group(True)
    of_experts = parallel_state.get_expert_data_parallel_group()
    kept = []
    with torch.no_grad():
        for chunk in model:
            buffers = [(buffer, everyone) for buffer in chunk.buffers]
            buffers += [(buffer, of_experts) for buffer in chunk.expert_parallel_buffers]
            for buffer, group in buffers:
                for bucket in buffer.buckets:  # reduced: each rank has its part of the sum
                    mine = shard_buffer(bucket.grad_data, group.size())[group.rank()].clone()
                    dist.all_gather_into_tensor(bucket.grad_data, mine, group=group)
            for parameter in chunk.module.parameters():
                kept.append((parameter, parameter.detach().clone()))
                parameter.copy_(parameter.main_grad)
        save_weights(model, folder)
        for parameter, value in kept:
            parameter.copy_(value)


def decayed(model: list[Any], optimizer: Any) -> dict[str, bool]:
    """Which of this rank's parameters have weight decay."""
    found = {}
    for part in optimizer.chained_optimizers:
        for chunk in model:
            for name, parameter in chunk.module.named_parameters():
                if parameter in part.model_param_group_index_map:
                    number, _ = part.model_param_group_index_map[parameter]
                    found[name] = part.optimizer.param_groups[number]["weight_decay"] > 0
    return found


def run_layout(
    kind: str, layout: Layout, weights: Path, before: Path | None, out: Path
) -> dict[str, Any]:
    """Opens the checkpoint of the layout before; trains from `weights`; leaves a checkpoint."""
    config = replace(configuration(kind, layout), output_dir=out, tensorboard=False)
    model, optimizer, scheduler = start(config)
    *steps, held_out = batches()
    result: dict[str, Any] = {}

    def validation() -> float:
        with gathered_parameters(model):
            return validate(model, micro_batches(held_out, config), config)

    if before is not None:
        progress = load_checkpoint(before, model, optimizer, scheduler)
        assert progress.step == STEPS
        result["validation of the layout before"] = validation()
        # One more step shows that the optimizer's state has moved too.
        train_step(model, optimizer, scheduler, iter(micro_batches(steps[0], config)), config)
        result["validation a step later"] = validation()
        model, optimizer, scheduler = start(config)
    load_start(model, weights)

    def before_update(*_: Any) -> bool:
        if not result["losses"]:
            save_gradients(model, out / "gradients")
        return True

    result["decayed"] = decayed(model, optimizer)
    result["losses"], result["z_losses"] = [], []
    for tokens in steps:
        parts = iter(micro_batches(tokens, config))
        loss, _, _, z_loss = train_step(
            model, optimizer, scheduler, parts, config, is_good=before_update
        )
        result["losses"].append(loss)
        result["z_losses"].append(z_loss)

    result["validation"] = validation()
    with gathered_parameters(model):
        saver = CheckpointSaver(config, Mock(spec=RunLog))
        saver.save(Progress(STEPS, STEPS * BATCH), model, optimizer, scheduler, wait=True)
    result["checkpoint"] = latest_checkpoint(out)
    return result


def run_layouts(
    kind: str, layouts: list[Layout], weights: Path, before: Path | None, folder: Path
) -> list[dict[str, Any]]:
    results = []
    for number, layout in enumerate(layouts):
        results.append(run_layout(kind, layout, weights, before, folder / str(number)))
        before = results[-1]["checkpoint"]
    return results
