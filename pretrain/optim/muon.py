"""Muon for the matrices of the layers (arXiv 2502.16982), beside AdamW for all other parameters.

Muon's update is the momentum of a matrix, made orthogonal. So a rank needs the whole matrix, of which
megatron-core's distributed optimizer gives each data-parallel rank a range, and tensor parallelism a part.
As in the paper's Distributed Muon, ranges are gathered for the update alone; weights, momentum and
checkpoints stay in ranges, as AdamW's. docs/design/muon.md says why megatron-core's own Muon is not used.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed.param_and_grad_buffer import shard_buffer
from torch import Tensor

from pretrain.optim.shards import own_ranges

MOMENTUM = "exp_avg"
"""The momentum's name in the optimizer's state. It is an average of gradients, as AdamW's first moment."""
RMS_OF_ADAMW = 0.2
"""An orthogonal update is scaled to this root mean square, about that of AdamW's (arXiv 2502.16982, section
2.2). So both have one learning rate and one weight decay."""


@dataclass(frozen=True)
class _Matrix:
    """A parameter that Muon updates, and the projections that it holds."""

    parameter: Any
    """[rows, columns] of this tensor-parallel rank."""
    first: int
    """Of its numbers in the bucket."""
    rows: tuple[int, ...]
    """Of each of its projections, in a query group or in the whole: megatron-core stores queries, keys and
    values as one parameter, and gate and up projections too. Each is a matrix of its own here."""

    def cut(self, x: Tensor) -> list[Tensor]:
        """Its projections of [rows, columns]."""
        groups = x.view(-1, sum(self.rows), x.shape[1])
        return [part.flatten(0, 1) for part in groups.split(self.rows, 1)]

    def join(self, projections: list[Tensor]) -> Tensor:
        """[rows, columns] of what `cut` gives."""
        groups = self.parameter.shape[0] // sum(self.rows)
        parts = [part.unflatten(0, (groups, -1)) for part in projections]
        return torch.cat(parts, 1).flatten(0, 1)

    @property
    def axis(self) -> int | None:
        """The axis that is cut over the tensor-parallel ranks; None: each rank has the whole."""
        axis = getattr(self.parameter, "partition_dim", -1)
        cut = getattr(self.parameter, "tensor_model_parallel", False)
        return axis if cut and parallel_state.get_tensor_model_parallel_world_size() > 1 else None


@dataclass(frozen=True)
class _Bucket:
    """A bucket of megatron-core's DDP: its numbers are cut evenly over the data-parallel ranks."""

    part: Any
    """The distributed optimizer."""
    numel: int
    group: Any
    """The data- and context-parallel ranks."""
    matrices: list[_Matrix]


class Muon:
    """Updates the layers' matrices, before megatron-core's step updates the rest."""

    def __init__(self, optimizer: Any, momentum: float) -> None:
        self._momentum = momentum
        self._own: dict[Any, tuple[Any, int, int]] = {}  # parameter: part, and range of it
        self._buckets: list[_Bucket] = []
        for part in optimizer.chained_optimizers:
            if part.is_stub_optimizer:
                continue
            names = {p: n for chunk in part.model_chunks for n, p in chunk.named_parameters()}
            ranges = {parameter: (start, end) for parameter, start, end in own_ranges(part)}
            for bucket in (bucket for buffer in part.buffers for bucket in buffer.buckets):
                matrices = [
                    _Matrix(p, _place(p, bucket), _rows(p, names[p], part.model_chunks[0].config))
                    for p in bucket.params_list
                    if is_matrix(p)
                ]
                if not matrices:
                    continue
                numel, group = bucket.grad_data.numel(), part.data_parallel_group
                self._buckets.append(_Bucket(part, numel, group, matrices))
                for parameter in (m.parameter for m in matrices):
                    if parameter in ranges:
                        self._own[parameter] = (part, *ranges[parameter])

    def keep_momentum_alone(self) -> None:
        """Frees the second moments that megatron-core has made of Muon's parameters, to load into."""
        for parameter, (part, *_) in self._own.items():
            part.optimizer.state[_master(part, parameter)[0]].pop("exp_avg_sq", None)

    @torch.no_grad()
    def step(self) -> None:
        """Updates the master weights, and uses up their gradients: AdamW then leaves them as they are.

        Called by all ranks, between clipping and megatron-core's step.
        """
        for bucket in self._buckets:
            gathered = self._gathered_momentum(bucket)
            rank, size = bucket.group.rank(), bucket.group.size()
            updates = [
                gathered[m.first : m.first + m.parameter.numel()].view(m.parameter.shape)
                for m in bucket.matrices
            ]
            for number, (matrix, update) in enumerate(zip(bucket.matrices, updates, strict=True)):
                if number % size == rank:  # each matrix is made orthogonal once
                    update.copy_(matrix.join([_orthogonal(matrix, x) for x in matrix.cut(update)]))
            sent = [
                dist.broadcast(
                    update,
                    dist.get_global_rank(bucket.group, number % size),
                    group=bucket.group,
                    async_op=True,
                )
                for number, update in enumerate(updates if size > 1 else [])
            ]
            for work in sent:
                work.wait()
            for matrix, update in zip(bucket.matrices, updates, strict=True):
                self._apply(matrix, update)

    def _gathered_momentum(self, bucket: _Bucket) -> Tensor:
        """Takes the gradients into the momentum. Returns Nesterov's momentum of the whole bucket, bf16
        [numel]; where there are other parameters, zeros.

        It is sent in bf16, in which it is made orthogonal.
        """
        device: Any = torch.cuda.current_device()
        whole = torch.zeros(bucket.numel, dtype=torch.bfloat16, device=device)
        for matrix in bucket.matrices:
            if matrix.parameter not in self._own:
                continue
            part, start, end = self._own[matrix.parameter]
            master, _ = _master(part, matrix.parameter)
            state = part.optimizer.state[master]
            if MOMENTUM not in state:
                state[MOMENTUM] = torch.zeros_like(master)
                if isinstance(part.optimizer, torch.optim.AdamW):  # it has a step of each parameter
                    state["step"] = torch.zeros((), device=master.device)
            if "step" in state:
                state["step"] += 1
            assert master.grad is not None
            state[MOMENTUM].lerp_(master.grad, 1 - self._momentum)
            nesterov = master.grad.lerp(state[MOMENTUM], self._momentum)
            whole[matrix.first + start : matrix.first + end] = nesterov
            master.grad = None
        size = bucket.group.size()
        if size > 1:
            mine = shard_buffer(whole, size)[bucket.group.rank()]
            dist.all_gather_into_tensor(whole, mine, group=bucket.group)
        return whole

    def _apply(self, matrix: _Matrix, orthogonal: Tensor) -> None:
        """Updates this rank's range of the master weights, with decoupled weight decay."""
        if matrix.parameter not in self._own:
            return
        part, start, end = self._own[matrix.parameter]
        master, group = _master(part, matrix.parameter)
        scaled = [x.float() * _scale(matrix, x) for x in matrix.cut(orthogonal)]
        update = matrix.join(scaled).view(-1)[start:end]
        master.mul_(1 - group["lr"] * group["weight_decay"])
        master.add_(update, alpha=-group["lr"])


def is_matrix(parameter: Any) -> bool:
    """Whether Muon updates a parameter: a matrix that is neither embedding nor output layer."""
    table = getattr(parameter, "is_embedding_or_output_parameter", False)
    return parameter.dim() == 2 and not table


def _rows(parameter: Any, name: str, config: Any) -> tuple[int, ...]:
    if name.endswith("linear_qkv.weight"):
        heads = config.num_attention_heads // config.num_query_groups
        return (heads * config.kv_channels, config.kv_channels, config.kv_channels)
    if name.endswith("linear_fc1.weight"):
        return (parameter.shape[0] // 2,) * 2
    return (parameter.shape[0],)


def _place(parameter: Any, bucket: Any) -> int:
    return parameter.main_grad.storage_offset() - bucket.grad_data.storage_offset()


def _master(part: Any, parameter: Any) -> tuple[Tensor, dict[str, Any]]:
    """This rank's range of a parameter's master weights, and its parameter group."""
    number, place = part.model_param_group_index_map[parameter]
    group = part.optimizer.param_groups[number]
    return group["params"][place], group


def _orthogonal(matrix: _Matrix, momentum: Tensor) -> Tensor:
    """This tensor-parallel rank's part of a projection's momentum, made orthogonal whole.

    Args:
        momentum: this rank's part. bf16 [rows, columns]
    """
    axis = matrix.axis
    if axis is None:
        return _newton_schulz(momentum)
    group: Any = parallel_state.get_tensor_model_parallel_group()
    momentum = momentum.contiguous()
    parts = [torch.empty_like(momentum) for _ in range(group.size())]
    dist.all_gather(parts, momentum, group=group)
    return _newton_schulz(torch.cat(parts, axis)).chunk(group.size(), axis)[group.rank()]


def _newton_schulz(x: Tensor) -> Tensor:
    """The orthogonal matrix near `x`, by the five Newton-Schulz iterations of torch's Muon. bf16.

    torch has them within its optimizer alone. That of a wide matrix, without momentum, decay and a factor
    of the learning rate, takes just them off zeros.
    """
    wide = x.T if x.shape[0] > x.shape[1] else x
    weight = torch.nn.Parameter(torch.zeros_like(wide, memory_format=torch.contiguous_format))
    weight.grad = wide.contiguous()
    torch.optim.Muon([weight], lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False).step()
    orthogonal = weight.detach().neg_()
    return orthogonal.T if x.shape[0] > x.shape[1] else orthogonal


def _scale(matrix: _Matrix, projection: Tensor) -> float:
    """Of the update of a projection, given this rank's part of it."""
    shape = list(projection.shape)
    if matrix.axis is not None:
        shape[matrix.axis] *= parallel_state.get_tensor_model_parallel_world_size()
    return RMS_OF_ADAMW * math.sqrt(max(shape))
