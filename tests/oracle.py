"""The unsharded reference: the plain-PyTorch model of the export, trained by plain PyTorch in fp32."""

from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ladder.config import ModelConfig
from megatron_ladder.hf.convert import megatron_to_hf
from megatron_ladder.hf.model_config import to_hf_config
from megatron_ladder.hf.modelling.modeling_ladder import LadderForCausalLM
from megatron_ladder.hf.modelling.rotary_ladder import rope_cos_sin
from pretrain.config.train import TrainConfig
from pretrain.run.checkpoint import load_weights


def plain_model(model: ModelConfig, weights: Path) -> LadderForCausalLM:
    """The plain model with a checkpoint's weights."""
    return plain_model_of(model, load_weights(weights))


def plain_model_of(model: ModelConfig, weights: dict[str, Tensor]) -> LadderForCausalLM:
    """The same, of whole tensors by megatron-core's names. The vocabulary keeps the padding, as the padding
    takes part in the loss's softmax."""
    config = to_hf_config(replace(model, residual="standard") if _desync(model) else model)
    config.vocab_size = model.padded_vocab_size
    plain = LadderForCausalLM(config).float()
    loaded = dict(megatron_to_hf(weights, config))
    missing, unexpected = plain.load_state_dict(loaded, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    plain.tie_weights()
    return plain


def _desync(model: ModelConfig) -> bool:
    return model.residual == "desync"


def loss(plain: LadderForCausalLM, model: ModelConfig, tp: int, tokens: Tensor) -> Tensor:
    """Mean cross-entropy of [batch, length + 1] tokens; `tp` matters to desync alone."""
    return _loss_of(_logits(plain, model, tp, tokens), tokens)


def _logits(plain: LadderForCausalLM, model: ModelConfig, tp: int, tokens: Tensor) -> Tensor:
    inputs = tokens[:, :-1]
    return desync_logits(plain, model, tp, inputs) if _desync(model) else plain(inputs).logits


def _loss_of(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def train_losses(
    plain: LadderForCausalLM, config: TrainConfig, tp: int, batches: list[Tensor]
) -> tuple[list[float], dict[str, Tensor]]:
    """Each batch's loss, and the first's gradients by Hugging Face's names. Gradients are of the loss and
    z-loss. `plain` is trained."""
    o = config.optimizer
    by_muon = o.optimizer == "muon"
    matrices = [
        p for n, p in plain.named_parameters() if p.dim() == 2 and "layers" in n and by_muon
    ]
    rest = [p for p in plain.parameters() if all(p is not m for m in matrices)]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(
            [
                {"params": [p for p in rest if p.dim() > 1], "weight_decay": o.weight_decay},
                {"params": [p for p in rest if p.dim() == 1], "weight_decay": 0.0},
            ],
            lr=o.lr,
            betas=(o.adam_beta1, o.adam_beta2),
            eps=o.adam_eps,
        )
    ]
    if by_muon:  # a Hugging Face model has a matrix for each projection
        optimizers.append(
            torch.optim.Muon(
                matrices,
                lr=o.lr,
                weight_decay=o.weight_decay,
                momentum=o.muon_momentum,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    assert config.schedule.min_lr_fraction == 1
    assert config.warmup_steps == 0
    losses, gradients = [], {}
    for batch in batches:
        plain.zero_grad()
        logits = _logits(plain, config.model, tp, batch)
        value = _loss_of(logits, batch)
        (value + o.z_loss_coeff * logits.logsumexp(-1).square().mean()).backward()
        if not gradients:
            gradients = {n: p.grad.clone() for n, p in plain.named_parameters()}
        torch.nn.utils.clip_grad_norm_(plain.parameters(), o.clip_grad)
        for optimizer in optimizers:
            optimizer.step()
        losses.append(value.item())
    return losses, gradients


def desync_logits(plain: LadderForCausalLM, model: ModelConfig, tp: int, tokens: Tensor) -> Tensor:
    """desync-n as one process: `tp` residual streams side by side.

    A rank's attention has its heads alone, its MLP its intermediate columns: here the whole module
    is run on the rank's stream with the others' part masked before the last projection.
    """
    core = plain.model
    x = core.embed_tokens(tokens)
    positions = torch.arange(tokens.shape[1])[None]
    cos, sin = rope_cos_sin(core.config, positions, x.dtype)
    streams = [x] * tp
    for i, layer in enumerate(core.layers):
        for j, (norm, module, last, extra) in enumerate(
            (
                (
                    layer.input_layernorm,
                    layer.self_attn,
                    layer.self_attn.o_proj,
                    (cos, sin, None),
                ),
                (layer.post_attention_layernorm, layer.mlp, layer.mlp.down_proj, ()),
            )
        ):
            outputs = [
                layer.scaled(_part(module, last, rank, tp, norm(stream), extra), j)
                for rank, stream in enumerate(streams)
            ]
            number = 2 * i + j + 1
            if number % model.desync_interval == 0 or number == 2 * model.num_layers:
                met = sum(y + s / tp for y, s in zip(outputs, streams, strict=True))
                streams = [met] * tp
            else:
                streams = [s + y for y, s in zip(outputs, streams, strict=True)]
    return plain.lm_head(core.norm(streams[0]))


def _part(module, last, rank: int, tp: int, x: Tensor, extra: tuple) -> Tensor:
    def mask(_module, inputs):
        keep = torch.zeros(inputs[0].shape[-1])
        keep[rank * len(keep) // tp : (rank + 1) * len(keep) // tp] = 1
        return (inputs[0] * keep,)

    handle = last.register_forward_pre_hook(mask)
    try:
        return module(x, *extra)
    finally:
        handle.remove()
