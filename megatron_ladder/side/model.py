"""A model with a side network, for megatron-core's schedules: the backbone runs without gradients.

The backbone runs first, as it always does; hooks keep its states. Then the side network runs on them. So a
ladder backbone hides its collectives as before. Down-projections need the states in backward, so to keep
them takes no more memory.

Pipeline stages send the side network's state behind what they send of the backbone, as one tensor. Its
gradient comes back in the same shape, zero in the backbone's part: megatron-core's schedules take one shape
for both directions.
"""

import copy
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_ladder.config import ModelConfig, ParallelConfig, TransformerImpl
from megatron_ladder.layers.stages import complete_state
from megatron_ladder.mcore_compat import LadderConfig, build_gpt_model
from megatron_ladder.side.config import SideConfig
from megatron_ladder.side.network import SideNetwork, weakly


class SideTunedModel(MegatronModule):
    """One chunk of the backbone, and the part of the side network beside it. It takes GPTModel's place.

    Its parameters are those of the side network. The backbone is no submodule, so DDP, the optimizer and
    checkpoints know nothing of it. It stays in training mode, without dropout: in evaluation mode
    megatron-core adds outputs to states in place, and states that are read later would change.

    Args:
        backbone: from `build_gpt_model`, of a model without dropout (`SideConfig.backbone`).
        side: beside this chunk.
        config: for megatron-core's schedules; all chunks share it.
    """

    # megatron-core sums the gradients of a tied table over its two stages. This table has none.
    share_embeddings_and_output_weights = False

    def __init__(self, backbone: GPTModel, side: SideNetwork, config: LadderConfig) -> None:
        super().__init__(config=config)
        assert not backbone.decoder.config.hidden_dropout
        # A tuple, because torch would register a module.
        self._backbone = (backbone.requires_grad_(False),)
        self.side = side
        self.pre_process, self.post_process = backbone.pre_process, backbone.post_process
        self.model_type, self.vp_stage = backbone.model_type, backbone.vp_stage
        self._is_running = False
        self._documents: Any = None
        self._before: Tensor | None = None  # the embedding, or the side network's state from before
        self._states: list[Tensor] = []
        self._newest: tuple[Any, Any] | None = None
        # Weak, since a cycle of references would keep the process groups, which the layers refer to.
        if self.pre_process:
            backbone.embedding.register_forward_hook(weakly(self._keep_embedding))
        for layer in backbone.decoder.layers:
            layer.register_forward_hook(weakly(self._keep_state))
        if self.post_process:
            hook = weakly(self._final_input)
            backbone.decoder.final_layernorm.register_forward_pre_hook(hook)

    @property
    def backbone(self) -> GPTModel:
        """The model that is not trained."""
        return self._backbone[0]

    @property
    def decoder(self) -> Any:
        """The block whose layers are trained: the side network's."""
        return self.side.blocks.decoder

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Takes what the stage before has sent, [s, b, h + h / r] (2 h of ladder kinds)."""
        sent = input_tensor[0] if isinstance(input_tensor, list) else input_tensor
        if sent is None:
            self.backbone.set_input_tensor(None)
            return
        small = self.side.config.hidden_size
        theirs, ours = sent.split([sent.size(-1) - small, small], dim=-1)
        self.backbone.set_input_tensor(theirs.detach().contiguous())
        self._before = ours.contiguous()

    def forward(
        self,
        input_ids: Tensor | None,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        labels: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """As GPTModel's.

        Returns:
            On the last stage losses [b, s], or without `labels` logits [b, s, vocabulary / tp]; on others
            the tensor for the next stage.
        """
        self._is_running, self._documents = True, packed_seq_params
        try:
            output = self.backbone(
                *(input_ids, position_ids, attention_mask),
                labels=labels,
                packed_seq_params=packed_seq_params,
            )
            if self.post_process:
                return output
            return torch.cat((output, self._side_output()), dim=-1)
        finally:
            self._is_running, self._before, self._states, self._newest = False, None, [], None

    def _side_output(self) -> Tensor:
        self._take_newest()
        assert self._before is not None
        return self.side(self._before, self._states, self._documents)

    def _keep_embedding(self, _: Any, __: Any, output: Tensor) -> None:
        if self._is_running:
            self._before = output

    def _keep_state(self, layer: Any, _: Any, output: Any) -> None:
        """Called after each layer. The collective of its last output may still run, but by then the next
        layer has waited for it: so the state is read one layer later."""
        if self._is_running:
            self._take_newest()
            if layer.layer_number - 1 in self.side.layers:
                self._newest = (layer, output)

    def _take_newest(self) -> None:
        if self._newest is not None:
            layer, output = self._newest
            self._newest = None
            self._states.append(complete_state(layer, *output))

    def _final_input(self, _: Any, args: Any) -> Any:
        """What the final norm reads instead of the backbone's last state."""
        return (self._side_output(),) if self._is_running else args


def side_tuned(
    backbone: list[GPTModel],
    model: ModelConfig,
    side: SideConfig,
    parallel: ParallelConfig,
    blocks_config: LadderConfig,
    impl: TransformerImpl = "auto",
    *,
    device: torch.device | None = None,
) -> list[SideTunedModel]:
    """Builds this rank's part of the side network beside its chunks of the backbone.

    Args:
        backbone: from `build_gpt_model`.
        model: the backbone's.
        parallel: the backbone's layout.
        blocks_config: from `transformer_config` of `side.model(model)`.
        device: as for `build_gpt_model`.
    """
    blocks = build_gpt_model(
        side.model(model), blocks_config, impl, device=device, blocks_only=True
    )
    seen = copy.copy(backbone[0].config)
    if parallel.pipeline_model_parallel_size > 1:
        seen.hidden_size += blocks_config.hidden_size
    chunks = []
    for theirs, ours in zip(backbone, blocks, strict=True):
        network = SideNetwork(
            ours,
            side.kept_layers(model.num_layers),
            model.hidden_size,
            first=theirs.pre_process,
            last=theirs.post_process,
        ).to(device or torch.cuda.current_device())
        chunks.append(SideTunedModel(theirs, network, seen))
    return chunks
