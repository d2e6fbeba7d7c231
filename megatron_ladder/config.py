"""Configuration of a model and of its layout over ranks, with the names of Megatron and Hugging Face.

`mcore_compat.transformer_config` is the one place that translates these to megatron-core's configuration.
"""

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from megatron_ladder.errors import UserError
from megatron_ladder.fields.chosen_layers import chosen_layers
from megatron_ladder.fields.experts import ExpertsConfig, check_experts
from megatron_ladder.fields.rope import check_rope
from megatron_ladder.fields.stages import check_stages
from megatron_ladder.fields.windows import layer_windows

Residual = Literal["standard", "ladder", "parallel", "parallel-ladder", "desync", "no-comm"]
# Kinds whose sub-modules read the state without the output of the last one. Each with the kind of its other
# layers, those that `ladder_layers` leaves out: they have the same weights, and read the last state.
FRESH: dict[Residual, Residual] = {"ladder": "standard", "parallel-ladder": "parallel"}
STALE: frozenset[Residual] = frozenset(FRESH)
# Kinds whose attention and MLP read one input, through one norm.
PARALLEL: frozenset[Residual] = frozenset(("parallel", "parallel-ladder"))
TpOverlap = Literal["none", "halves"]
ResidualScaling = Literal["none", "1/n", "1/sqrt-n", "skipinit"]
TransformerImpl = Literal["auto", "local", "transformer_engine"]
Precision = Literal["fp32", "bf16"]
Recompute = Literal["none", "selective", "full"]
Attention = Literal["auto", "te", "torch", "unfused"]
"""The implementation of core attention; auto: layers/attention/choice.py. unfused: megatron-core's own."""
AllReduce = Literal["exact", "int8"]
"""How partial outputs are summed over tensor-parallel ranks. int8: inference only (quantised_sum.py)."""

# The rows of the vocabulary are padded to a multiple of this in every layout, so that a checkpoint's shapes
# do not depend on the tensor-parallel size of the training.
VOCAB_MULTIPLE = 128
# No model has more. Beyond them lie numbers that nobody meant, for which lists and shapes have no room.
MOST_LAYERS, MOST_SIZE, MOST_PARAMETERS = 10_000, (1 << 31) - 1, 10**15


@dataclass(frozen=True)
class ModelConfig:
    """A Llama-family decoder: RMSNorm, SwiGLU, RoPE, grouped-query attention.

    Raises UserError when the numbers do not fit each other.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int | None = None
    """Key/value heads; None means one for every attention head (MHA)."""
    kv_channels: int | None = None
    """Channels of a head; None: hidden_size / num_attention_heads."""
    add_qkv_bias: bool = False
    """Biases of queries, keys and values, as in Qwen2."""
    qk_layernorm: bool = False
    """RMSNorm of each head's query and key before RoPE, as in Qwen3."""
    vocab_size: int | None = None
    """Ids the tokenizer can give; None takes it from the data."""
    residual: Residual = "ladder"
    """Which state a sub-module reads: the last (standard), the one before (ladder), or one norm for
    attention and MLP together (parallel). arXiv 2501.06589, section 3. parallel-ladder: as parallel, of
    the state one layer before. desync sums over the tensor-parallel ranks only now and then; no-comm
    never does, for timing only."""
    desync_interval: int = 2
    """With residual=desync: the n of desync-n, sub-modules from one all-reduce to the next."""
    ladder_layers: int | tuple[int, ...] | None = None
    """With residual=ladder or parallel-ladder: the last N layers, or a list of layers from 0; the others
    are standard, or parallel. None makes every layer a ladder layer."""
    residual_scaling: ResidualScaling = "none"
    """What an output is multiplied by before it is added (arXiv 2510.03470): 1/n or 1/sqrt(n), for n = 2
    num_layers sub-modules. skipinit: a learned number that starts at 0. none: megatron-core's initial
    weights alone have 1/sqrt(n)."""
    layer_norms: bool = True
    """False: attention and MLP read the state without a norm; the norm after the last layer stays."""
    max_position_embeddings: int = 2048
    rotary_base: float = 10000.0
    sliding_window: int | None = None
    """Tokens that a token attends to, itself and those just before it, as in Mistral. None: all."""
    sliding_window_layers: int | tuple[int, ...] | None = None
    """With sliding_window: the last N layers, or a list of layers from 0, have it; the others attend to
    all tokens. None: every layer has it."""
    rope_scaling_factor: float | None = None
    """Stretches RoPE's wavelengths; None: does not."""
    rope_scaling_type: Literal["llama3", "linear", "yarn"] = "llama3"
    """llama3: long wavelengths alone (low 1, high 4). linear: all. yarn: long wavelengths alone, and
    sharper attention (arXiv 2309.00071)."""
    rope_original_max_position_embeddings: int | None = None
    """The context before it was stretched. None: 8192 with llama3; with yarn max_position_embeddings /
    rope_scaling_factor."""
    rope_beta_fast: float = 32.0
    """With yarn: what turns more often in the original context is not stretched."""
    rope_beta_slow: float = 1.0
    """With yarn: what turns less often in the original context is stretched by the whole factor."""
    rope_attention_factor: float | None = None
    """With yarn: multiplies queries and keys. None: 0.1 ln(rope_scaling_factor) + 1. 1: NTK-by-parts."""
    layernorm_epsilon: float = 1e-5
    init_method_std: float = 0.02
    share_embeddings_and_output_weights: bool = True
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)

    def __post_init__(self) -> None:
        for name in (
            "num_layers",
            "hidden_size",
            "ffn_hidden_size",
            "num_attention_heads",
            "num_query_groups",
            "kv_channels",
            "vocab_size",
            "max_position_embeddings",
            "desync_interval",
            "sliding_window",
            "rope_original_max_position_embeddings",
        ):
            value, most = getattr(self, name), MOST_LAYERS if name == "num_layers" else MOST_SIZE
            if value is not None and not 1 <= value <= most:
                raise UserError(
                    f"model.{name} is {value}: it must be at least 1"
                    + (f" and at most {most:,}" if value > most else "")
                )
        for name in ("layernorm_epsilon", "init_method_std"):
            if not 0 <= (value := getattr(self, name)) < math.inf:
                raise UserError(f"model.{name} is {value}: it must be a number of 0 or more")
        for name in ("rotary_base", "rope_scaling_factor", "rope_attention_factor"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"model.{name} is {value}: it must be a number above 0")
        for name, choices in (("residual", Residual), ("residual_scaling", ResidualScaling)):
            if getattr(self, name) not in get_args(choices):
                raise UserError(
                    f"model.{name} is {getattr(self, name)!r}: choose one of "
                    f"{', '.join(get_args(choices))}"
                )
        if self.kv_channels is None and self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"model.hidden_size {self.hidden_size} is not a multiple of "
                f"model.num_attention_heads {self.num_attention_heads}: change one, or set "
                "model.kv_channels"
            )
        if self.head_dim % 2:
            raise UserError(
                f"a head has {self.head_dim} channels (model.kv_channels, or model.hidden_size / "
                "model.num_attention_heads): RoPE needs an even number"
            )
        if self.num_attention_heads % self.kv_heads:
            raise UserError(
                f"model.num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"model.num_query_groups {self.kv_heads}"
            )
        if (count := self.num_parameters(embeddings=False)) > MOST_PARAMETERS:
            raise UserError(
                f"model: these sizes make {count:,} parameters; at most {MOST_PARAMETERS:,} are possible"
            )
        for name in ("attention_dropout", "hidden_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"model.{name} is {getattr(self, name)}: a share from 0 up to 1")
        self.layer_residuals()  # refuses ladder_layers that do not exist
        layer_windows(self)
        check_rope(self)

    @property
    def kv_heads(self) -> int:
        """The number of key/value heads of a layer."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def head_dim(self) -> int:
        """The number of channels of a head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def attention_width(self) -> int:
        """The channels of all heads together; hidden_size unless kv_channels says otherwise."""
        return self.num_attention_heads * self.head_dim

    @property
    def padded_vocab_size(self) -> int:
        """The number of rows of the embedding: `vocab_size`, rounded up to a multiple of 128."""
        assert self.vocab_size is not None, "vocab_size is set from the data before building"
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    def layer_residuals(self) -> tuple[Residual, ...]:
        """The residual kind of each layer, first to last.

        Raises:
            UserError: `ladder_layers` names a layer that does not exist, or the kind has no ladder layers.
        """
        if self.ladder_layers is None:
            return (self.residual,) * self.num_layers
        if self.residual not in STALE:
            raise UserError(
                f"model.ladder_layers is set but model.residual is {self.residual}: "
                "set model.residual to ladder or parallel-ladder, or leave ladder_layers out"
            )
        chosen = chosen_layers("ladder_layers", self.ladder_layers, self.num_layers)
        other = FRESH[self.residual]
        return tuple(self.residual if i in chosen else other for i in range(self.num_layers))

    @property
    def is_standard(self) -> bool:
        """Whether every layer is one of Llama's: standard, with norms, and outputs added as they are."""
        plain = self.residual_scaling == "none" and self.layer_norms
        return plain and set(self.layer_residuals()) == {"standard"}

    def num_parameters(self, *, embeddings: bool = True) -> int:
        """Number of trained parameters.

        Args:
            embeddings: count the embedding and the output layer, with the padding of the vocabulary.
        """
        attention = self.hidden_size * self.head_dim * (2 * self.num_attention_heads)
        attention += self.hidden_size * self.head_dim * (2 * self.kv_heads)
        layer = attention + self._vectors_of_a_layer()
        total = self.num_layers * layer + self._mlp_weights(active=False) + self.hidden_size
        if embeddings:
            tables = 1 if self.share_embeddings_and_output_weights else 2
            total += tables * self.padded_vocab_size * self.hidden_size
        return total

    def num_matmul_parameters(self) -> int:
        """Number of weights that a token is multiplied by: all but norms, biases, the embedding look-up and
        the experts that the token is not sent to."""
        vectors = self.num_layers * self._vectors_of_a_layer() + self.hidden_size
        look_up = 0 if self.share_embeddings_and_output_weights else 1
        idle = self._mlp_weights(active=False) - self._mlp_weights(active=True)
        others = vectors + look_up * self.padded_vocab_size * self.hidden_size + idle
        return self.num_parameters() - others

    def _mlp_weights(self, *, active: bool) -> int:
        """Number of weights of all layers' MLPs and experts; `active`: of those that one token goes
        through."""
        mlp = 3 * self.hidden_size * self.ffn_hidden_size
        experts = self.experts.layer_weights(self.hidden_size, self.ffn_hidden_size, active=active)
        return sum(experts if e else mlp for e in self.experts.layers(self.num_layers))

    def _vectors_of_a_layer(self) -> int:
        """Number of parameters in the norms, biases and learned scales of one layer."""
        outputs = 1 if self.residual in PARALLEL else 2  # that are added; as many norms
        norm = self.hidden_size if self.layer_norms else 0
        count = outputs * (norm + (self.residual_scaling == "skipinit"))
        if self.add_qkv_bias:
            count += self.head_dim * (self.num_attention_heads + 2 * self.kv_heads)
        return count + (2 * self.head_dim if self.qk_layernorm else 0)


@dataclass(frozen=True)
class ParallelConfig:
    """How a model is laid out over ranks. The rest of the world size is data parallel."""

    tensor_model_parallel_size: int = 1
    sequence_parallel: bool = False
    """Cuts the states between sub-modules along the sequence, over the tensor-parallel ranks."""
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    """Parts of the model a pipeline stage holds (the interleaved schedule); None: one (1F1B)."""
    num_layers_in_first_pipeline_stage: int | None = None
    """None: as many as in the stages between."""
    num_layers_in_last_pipeline_stage: int | None = None
    context_parallel_size: int = 1
    """Divides the tokens of each sequence over so many ranks, for long sequences."""
    expert_model_parallel_size: int = 1
    """Ranks that divide each layer's experts: of the tensor-, context- and data-parallel ones."""
    tp_overlap: TpOverlap = "none"
    """halves: standard and parallel layers hide their tensor-parallel collectives too. The two halves of
    a micro-batch take turns: the collectives of one run while the other computes."""

    def __post_init__(self) -> None:
        for name in (
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "virtual_pipeline_model_parallel_size",
            "num_layers_in_first_pipeline_stage",
            "num_layers_in_last_pipeline_stage",
            "context_parallel_size",
            "expert_model_parallel_size",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"parallel.{name} is {value}: it must be at least 1")
        if self.pipeline_model_parallel_size == 1:
            for name in (
                "virtual_pipeline_model_parallel_size",
                "num_layers_in_first_pipeline_stage",
                "num_layers_in_last_pipeline_stage",
            ):
                if getattr(self, name) is not None:
                    raise UserError(
                        f"parallel.{name} is set, but parallel.pipeline_model_parallel_size is 1: "
                        "there are no stages to divide"
                    )

    @property
    def model_parallel_size(self) -> int:
        """The number of ranks that hold one copy of the model together, its experts left aside."""
        return (
            self.tensor_model_parallel_size
            * self.pipeline_model_parallel_size
            * self.context_parallel_size
        )

    @property
    def least_ranks(self) -> int:
        """The least number of ranks on which the whole model is; there may be any multiple of it."""
        ep = self.expert_model_parallel_size
        of_a_stage = self.tensor_model_parallel_size * self.context_parallel_size
        return self.pipeline_model_parallel_size * math.lcm(of_a_stage, ep)

    @property
    def num_chunks(self) -> int:
        """The number of parts (chunks) of the model on each rank."""
        return self.virtual_pipeline_model_parallel_size or 1

    def data_parallel_size(self, world_size: int) -> int:
        """The number of copies of the model in `world_size` ranks.

        Raises:
            UserError: `world_size` is not a multiple of `least_ranks`.
        """
        if world_size % self.least_ranks:
            ep = self.expert_model_parallel_size
            raise UserError(
                f"{world_size} ranks do not divide into TP {self.tensor_model_parallel_size} x "
                f"PP {self.pipeline_model_parallel_size} x CP {self.context_parallel_size} = "
                f"{self.model_parallel_size}"
                + (f", with experts over {ep} of TP x CP x DP" if ep > 1 else "")
                + f": start a multiple of {self.least_ranks} ranks"
            )
        return world_size // self.model_parallel_size


def own_layers(model: ModelConfig, parallel: ParallelConfig) -> bool:
    """Whether this project's layers run, and not megatron-core's own TransformerLayer."""
    return not model.is_standard or parallel.tp_overlap == "halves"


def check_layout(model: ModelConfig, parallel: ParallelConfig, *, inference: bool = False) -> None:
    """Checks that a layout fits a model: that it can cut the model evenly, and supports its residual.

    Args:
        model: with `vocab_size` set.
        parallel: the layout.
        inference: of an inference engine.

    Raises:
        UserError: the first thing that does not fit.
    """
    tp = parallel.tensor_model_parallel_size
    for name, size in (
        ("num_attention_heads", model.num_attention_heads),
        ("num_query_groups", model.kv_heads),
        ("ffn_hidden_size", model.ffn_hidden_size),
        ("padded vocabulary", model.padded_vocab_size),
    ):
        if size % tp:
            raise UserError(
                f"model.{name} {size} is not divisible by "
                f"parallel.tensor_model_parallel_size {tp}: choose a size that divides it"
            )
    if parallel.tp_overlap == "halves" and (
        tp == 1 or set(model.layer_residuals()) not in ({"standard"}, {"parallel"})
    ):
        raise UserError(
            "parallel.tp_overlap halves hides the collectives of standard and parallel layers over several "
            f"tensor-parallel ranks: model.residual is {model.residual}, "
            f"parallel.tensor_model_parallel_size {tp}. Leave it out"
        )
    if model.residual in ("desync", "no-comm") and parallel.sequence_parallel:
        raise UserError(
            f"model.residual {model.residual} does not go with parallel.sequence_parallel: its ranks "
            "do not share their residual states"
        )
    check_stages(model.num_layers, parallel)
    check_experts(model, parallel, inference=inference)
