"""Linear maps between the layers of two models (arXiv 2505.13898): they show which layers do the same."""

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_ladder.hf.modelling.modeling_ladder import LadderForCausalLM
from pretrain.depth.measures import relative
from pretrain.depth.states import run

# The ridge of the least-squares fit, in shares of the mean square of the states. Without it a channel that
# is always zero would make the equations unsolvable.
RIDGE = 1e-6


def states_after_layers(model: LadderForCausalLM, sequences: Tensor) -> Tensor:
    """The residual stream after each layer.

    Args:
        sequences: int64 [count, length + 1], token ids; the last of each sequence is not read.

    Returns:
        fp32 [layers, count, length, hidden], on the model's device.
    """
    found = [run(model, sequence[:-1]).states[1:] for sequence in sequences]
    return torch.stack(found, dim=1)


def map_errors(states: Tensor, others: Tensor) -> list[list[float]]:
    """How well a linear map f gives the state after layer i of one model from layer j of the other.

    f is fitted by least squares on every other sequence; the error is measured on the rest.

    Args:
        states: the model's states h, fp32 [layers, count, length, hidden], with a count of at least 2.
        others: the other model's states h' on the same tokens, fp32 [layers', count, length, hidden'].

    Returns:
        [i][j]: the mean over tokens of |h_i - f(h'_j)| / |h_i|.
    """
    errors = torch.zeros(len(states), len(others))
    for j, other in enumerate(tqdm(others, "linear maps", disable=None)):
        fitted_on, measured_on = (_tokens(other[start::2]) for start in (0, 1))
        square = fitted_on.T @ fitted_on
        square += RIDGE * square.diagonal().mean() * torch.eye(len(square)).to(square)
        factor = torch.linalg.cholesky(square)
        for i, state in enumerate(states):
            target, wanted = (_tokens(state[start::2]) for start in (0, 1))
            weights = torch.cholesky_solve(fitted_on.T @ target, factor)
            errors[i, j] = relative(wanted - measured_on @ weights, wanted).mean()
    return errors.tolist()


def _tokens(states: Tensor) -> Tensor:
    """[count, length, hidden] -> fp64 [count * length, hidden]."""
    return states.flatten(0, 1).double()
