"""Linear maps between the layers of two models (arXiv 2505.13898): which do the same."""

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_ladder.hf.modeling_ladder import LadderForCausalLM
from pretrain.depth.measures import relative
from pretrain.depth.states import run

# Of the mean square of the states: keeps a channel that is always zero from making it unsolvable.
RIDGE = 1e-6


def states_after_layers(model: LadderForCausalLM, sequences: Tensor) -> Tensor:
    """[layers, count, length, hidden] in fp32, on the model's device, of [count, length + 1] token ids."""
    found = [run(model, sequence[:-1]).states[1:] for sequence in sequences]
    return torch.stack(found, dim=1)


def map_errors(states: Tensor, others: Tensor) -> list[list[float]]:
    """How well layer i of a model is a linear map of layer j of another.

    The map is the least-squares one on every other sequence; the error is measured on the rest.

    Args:
        states: [layers, count, length, hidden] of the model, count at least 2.
        others: [layers', count, length, hidden'] of the other, of the same tokens.

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
