"""Three updates by Muon on given gradients, beside megatron-core's TensorParallelMuon. For one rank."""

import torch
from megatron.core.optimizer.emerging_optimizers import TensorParallelMuon

from pretrain.optim.muon import RMS_OF_ADAMW, is_matrix
from pretrain.optim.optimizer import update
from tests.distributed.layouts import configuration, start


def differences() -> dict[str, float]:
    """By the name of a matrix, what differs over how far it has gone. megatron-core takes gate and up
    projection as one matrix, and is left out there."""
    config = configuration("muon")
    o, model = config.optimizer, config.model
    (chunk,), optimizer, scheduler = start(config)
    named = [(n, p) for n, p in chunk.module.named_parameters() if is_matrix(p) and "fc1" not in n]
    begin = {name: p.detach().clone() for name, p in named}
    copies = {name: torch.nn.Parameter(p.detach().clone()) for name, p in named}
    queries = {id(p) for name, p in copies.items() if "linear_qkv" in name}
    heads = model.num_attention_heads // model.kv_heads
    theirs = TensorParallelMuon(
        list(copies.values()),
        lr=o.lr,
        momentum=o.muon_momentum,
        nesterov=True,
        weight_decay=o.weight_decay,
        split_qkv=True,
        is_qkv_fn=lambda p: id(p) in queries,
        qkv_split_shapes=[heads * model.head_dim, model.head_dim, model.head_dim],
        coefficient_type="simple",  # torch's
        scale_mode="spectral",
        extra_scale_factor=RMS_OF_ADAMW,
    )
    torch.manual_seed(3)
    for _ in range(3):
        for parameter in chunk.module.parameters():
            parameter.main_grad.zero_()
        for name, parameter in named:
            gradient = 1e-3 * torch.randn(parameter.shape)
            parameter.main_grad.copy_(gradient)
            copies[name].grad = gradient
        scheduler.step(increment=1)
        optimizer.prepare_grads()
        update(optimizer, grad_norm=0.0)
        theirs.step()
    return {
        name: ((p - copies[name]).norm() / (p - begin[name]).norm()).item() for name, p in named
    }
