"""What a side network takes in a layout: memory, and operations."""

from pretrain.config.train import TrainConfig
from pretrain.run.metrics import flops_per_token


def share_of_layers(config: TrainConfig) -> float:
    """The share of the backbone's layers that have a block of the side network."""
    return len(config.side.kept_layers(config.model.num_layers)) / config.model.num_layers


def side_parameters(config: TrainConfig, stage: int, layers: int) -> float:
    """The number of the side network's parameters on one GPU of a pipeline stage.

    The tensor-parallel ranks share the blocks. The projections are whole on each of them.

    Args:
        layers: of the backbone, in this stage. Those without a block are taken to be spread evenly.
    """
    side, parallel = config.side, config.parallel
    projection = config.model.hidden_size * side.model(config.model).hidden_size
    rung = (
        side.block_parameters(config.model) / parallel.tensor_model_parallel_size + projection + 1
    )
    ends = int(stage == 0) + int(stage == parallel.pipeline_model_parallel_size - 1)
    return layers * share_of_layers(config) * rung + ends * projection


def side_flops(config: TrainConfig, attended: float) -> float:
    """The side network's own operations for one token of training it.

    Args:
        attended: as in `flops_per_token`.
    """
    model, side = config.model, config.side
    return flops_per_token(
        num_layers=len(side.kept_layers(model.num_layers)),
        attention_width=side.model(model).attention_width,
        seq_length=attended,
        matmul_parameters=side.num_parameters(model),
    )


def with_side_network(config: TrainConfig, flops: float, attended: float) -> float:
    """The operations for one token of training a side network.

    The backbone has a forward alone, which is a third of training it. Its head also passes the gradient on.

    Args:
        flops: for training the backbone.
        attended: as in `flops_per_token`.
    """
    head = 2 * config.model.padded_vocab_size * config.model.hidden_size
    return flops / 3 + head + side_flops(config, attended)
