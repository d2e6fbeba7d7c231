"""The time that context parallelism adds to a step: keys and values that ranks send. Modelled."""

from megatron_ladder.config import ModelConfig
from pretrain.config.train import TrainConfig
from pretrain.plan.planner import BF16, Hardware


def gathers(config: TrainConfig) -> bool:
    """Whether context-parallel ranks gather all keys and values before attention, and have no ring."""
    no_ring = config.documents_divided or config.model.sliding_window is not None
    return no_ring or config.attention in ("torch", "unfused")


def ring_seconds(
    model: ModelConfig,
    hardware: Hardware,
    *,
    tokens: int,
    seq_length: float,
    tp: int,
    cp: int,
    gathers: bool = False,
) -> tuple[float, float]:
    """What context-parallel ranks add to one layer's forward and backward of a micro-batch.

    In a ring a rank computes attention in cp parts. During each but the last it sends keys and values on;
    in backward their gradients as well. What a transfer takes longer than a part is exposed.

    Args:
        tokens: of the micro-batch, of one rank.
        gathers: the same is sent, but before attention (in backward, around it): all of it is exposed.
    """
    if cp == 1:
        return 0.0, 0.0
    sent = BF16 * tokens * 2 * model.kv_heads * model.head_dim / tp
    part_s = hardware.attention_s(2.0 * tokens * seq_length * model.attention_width / tp) / cp
    if gathers:
        part_s = 0.0
    link = hardware.between(tp * cp)
    forward_s = max(0.0, link.seconds(sent) - part_s)
    backward_s = max(0.0, link.seconds(2 * sent) - 2.5 * part_s)
    return (cp - 1) * forward_s, (cp - 1) * backward_s
