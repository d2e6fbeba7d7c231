"""The teacher of logit distillation: the unmodified model, whose predictions the changed model learns."""

from dataclasses import replace

import torch

from megatron_ladder.mcore_compat import build_gpt_model, transformer_config
from pretrain.config.train import TrainConfig
from pretrain.data.batches import Batch
from pretrain.loop.step import forward_logits
from pretrain.run.checkpoint import load_initial_weights
from pretrain.start.initial import initial_checkpoint, original_model


class Teacher:
    """The unmodified model of `init_from`, at the run's layout. It is not trained.

    It runs whole where the run goes in halves: its kind may be another one, which has no halves.

    Build it before a checkpoint is loaded: building a model draws random numbers, and loading the
    checkpoint then restores the random states.
    """

    def __init__(self, config: TrainConfig) -> None:
        assert config.init_from is not None
        model = original_model(config.init_from)
        mcore_config = transformer_config(
            model,
            replace(config.parallel, tp_overlap="none"),
            precision=config.precision,
            impl=config.transformer_impl,
            deterministic=config.deterministic,
            attention=config.attention,
            documents_apart=not config.data.attend_across_documents,
            micro_batch_size=config.micro_batch_size,
            seq_length=config.data.seq_length,
        )
        self._chunks = build_gpt_model(model, mcore_config, config.transformer_impl)
        for chunk in self._chunks:
            chunk.eval().requires_grad_(False)
        named = {str(number): chunk for number, chunk in enumerate(self._chunks)}
        load_initial_weights(initial_checkpoint(config.init_from), named)
        self._config = config

    @torch.no_grad()
    def add_logits(self, micro_batches: list[Batch]) -> None:
        """Adds `teacher_logits` to each micro-batch, on ranks of the last pipeline stage.

        Their shape is [micro_batch_size, seq_length / context_parallel_size, padded_vocab_size / tp]. Those
        of all micro-batches of a step are in memory at the same time.
        """
        logits = forward_logits(self._chunks, micro_batches, self._config)
        for batch, mine in zip(micro_batches, logits, strict=False):  # [] on other stages
            batch["teacher_logits"] = mine
