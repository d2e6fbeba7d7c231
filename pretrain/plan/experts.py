"""What experts take in a layout: rows that ranks send each other, parameters, memory.

expert_times.py has the time.
"""

import math
from dataclasses import dataclass

from megatron_ladder.config import ModelConfig
from pretrain.config.train import TrainConfig

BF16, FP32, INT64 = 2, 4, 8  # bytes

IMBALANCE = 2.0
"""The tokens of a layer's fullest expert in one micro-batch, over the mean of its experts. Assumed: a run's
own is `expert_imbalance` in its log."""


@dataclass(frozen=True)
class Rows:
    """Tokens of one layer and micro-batch on the fullest rank. Each is a row of hidden_size numbers."""

    routed: float
    """Tokens that the rank has, and routes."""
    sent: float
    """Rows that it sends to experts: a token goes to several."""
    received: float
    """Rows that its own experts work on."""

    @property
    def exchanged(self) -> float:
        """Rows of one all-to-all on the rank that sends, or receives, the most."""
        return max(self.sent, self.received)


def has_experts(model: ModelConfig) -> bool:
    return model.experts.num_moe_experts is not None


def imbalance_of_ranks(experts: int, ranks: int, of_experts: float = IMBALANCE) -> float:
    """The rows of the fullest rank, over the mean.

    Taken are experts whose loads are independent. Then a sum over n of them scatters by sqrt(n) of one's,
    and the largest of r such sums lies sqrt(2 ln r) times that above the mean.

    Args:
        experts: of a layer.
        ranks: that divide them.
        of_experts: the tokens of the fullest expert, over the mean.
    """
    share = ranks / experts * math.log(ranks) / math.log(experts)
    return 1 + (of_experts - 1) * math.sqrt(share)


def rows_of(config: TrainConfig, of_experts: float = IMBALANCE) -> Rows:
    """The rows of a layer of experts in a layout.

    With a capacity that is padded, each expert gets its capacity from each rank. With one that is not, the
    fullest rank's experts get at most so many times the mean.

    Args:
        of_experts: the tokens of the fullest expert, over the mean.
    """
    experts, parallel = config.model.experts, config.parallel
    count = experts.num_moe_experts
    assert count is not None
    cut = parallel.context_parallel_size * parallel.tensor_model_parallel_size
    routed = config.micro_batch_size * config.data.seq_length / cut
    sent = routed * experts.moe_router_topk
    factor = experts.moe_expert_capacity_factor
    if factor is not None and experts.moe_pad_expert_input_to_capacity:
        padded = float(count * math.ceil(sent / count * factor))
        return Rows(routed, padded, padded)
    uneven = imbalance_of_ranks(count, parallel.expert_model_parallel_size, of_experts)
    if factor is not None:
        return Rows(routed, sent * min(1.0, factor), sent * min(uneven, factor))
    return Rows(routed, sent, sent * uneven)


def local_experts(config: TrainConfig) -> int:
    """Routed experts of a layer on each rank."""
    return (config.model.experts.num_moe_experts or 0) // config.parallel.expert_model_parallel_size


def expert_ranks(config: TrainConfig, dp: int) -> int:
    """Ranks that have the same experts, and sum their gradients: of a stage's ranks one in EP."""
    parallel = config.parallel
    ranks = parallel.tensor_model_parallel_size * parallel.context_parallel_size * dp
    return ranks // parallel.expert_model_parallel_size


def routed_parameters(config: TrainConfig) -> float:
    """The number of parameters of one layer's routed experts on one rank. Tensor parallelism cuts none."""
    model = config.model
    return (
        local_experts(config)
        * 3
        * model.hidden_size
        * model.experts.expert_size(model.ffn_hidden_size)
    )


def kept_bytes(model: ModelConfig, rows: Rows, *, recomputed: bool = False) -> float:
    """Bytes that one layer's router and routed experts keep for backward on one GPU, besides what the layer
    keeps for attention and norms.

    For each received row, in bf16: itself, the first GEMM's output (2 f) and SwiGLU's (f), and its weight
    in fp32. For each sent row its place. For each routed token: the choice twice, its weights, and of all
    experts two scores in fp32 and a mask; with a capacity a second list of places, and two more masks. The
    outputs of experts are not kept: nothing but sums reads them.

    Args:
        recomputed: this project's full recomputation, which computes the experts again. megatron-core's, of
            standard layers, keeps nothing of this.
    """
    experts = model.experts
    width = experts.expert_size(model.ffn_hidden_size)
    a_token = experts.moe_router_topk * (2 * INT64 + FP32)
    lists = 1 if experts.moe_expert_capacity_factor is None else 2
    a_token += (experts.num_moe_experts or 0) * (2 * FP32 + 2 * lists - 1)
    a_row = BF16 * (model.hidden_size + 3 * width * (not recomputed)) + FP32
    return a_row * rows.received + INT64 * lists * rows.sent + a_token * rows.routed


def buffer_bytes(model: ModelConfig, rows: Rows) -> float:
    """Bytes that one layer's backward takes at most for rows on their way, and for their gradients.

    The largest of: what an all-to-all reads and writes; around SwiGLU the gradients of its output and its
    input; around the first GEMM those of its output and of the rows; those of the rows in two orders.
    """
    h, width = model.hidden_size, model.experts.expert_size(model.ffn_hidden_size)
    most = max(
        h * (rows.sent + rows.received),
        3 * width * rows.received,
        (2 * width + h) * rows.received,
        2 * h * rows.received,
    )
    return BF16 * most
