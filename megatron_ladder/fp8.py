"""FP8 GEMMs of Transformer Engine: the recipes, and their requirements for the model and the machine."""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

from megatron_ladder.config import PARALLEL, ModelConfig, ParallelConfig, Precision
from megatron_ladder.errors import UserError

Fp8Recipe = Literal["delayed", "tensorwise", "blockwise", "mxfp8"]

# The lowest compute capability that each recipe needs, and the names of GPUs that have it.
CAPABILITIES: dict[Fp8Recipe, tuple[tuple[int, int], str]] = {
    "delayed": ((8, 9), "Ada, Hopper and later"),
    "tensorwise": ((8, 9), "Ada, Hopper and later"),
    "blockwise": ((9, 0), "Hopper and later"),
    "mxfp8": ((10, 0), "data-centre Blackwell"),
}
# The recipes that go with a mixture of experts. delayed has a history for each expert; megatron-core would
# store them in another order than Transformer Engine has them.
OF_EXPERTS: tuple[Fp8Recipe, ...] = ("tensorwise", "blockwise", "mxfp8")
# Two more requirements of Transformer Engine. Its blockwise GEMM needs the cuBLAS of CUDA 12.9. Its mxfp8
# needs a compute capability below MXFP8_BELOW: from there on it does not have all layouts of that GEMM.
BLOCKWISE_CUDA, MXFP8_BELOW = (12, 9), (12, 0)


@dataclass(frozen=True)
class Fp8Config:
    """The layers' linears in FP8, with precision bf16. Attention, embedding and head stay bf16."""

    recipe: Fp8Recipe | None = None
    """How scales are found: from the maxima of steps before (delayed), from each tensor (tensorwise), or
    from blocks of it (blockwise; mxfp8, on Blackwell). None: no FP8."""
    num_layers_at_start_in_bf16: int = 0
    num_layers_at_end_in_bf16: int = 0
    """First and last layers whose GEMMs stay bf16; not with delayed."""
    primary_weights: bool = False
    """The linears' weights are kept and gathered in FP8 alone, beside the optimizer's fp32 ones."""


def check_fp8(
    fp8: Fp8Config,
    model: ModelConfig,
    parallel: ParallelConfig,
    precision: Precision,
    tokens: int,
) -> None:
    """Checks that a model and its layout fit an FP8 recipe. It does not look at the machine.

    `check_machine` checks the machine.

    Args:
        fp8: the options.
        model: the model, whose sizes must fit the recipe.
        parallel: the layout.
        precision: must be bf16.
        tokens: tokens of a micro-batch: sequence length times micro-batch size.

    Raises:
        UserError: the first thing found wrong.
    """
    in_bf16 = fp8.num_layers_at_start_in_bf16, fp8.num_layers_at_end_in_bf16
    if min(in_bf16) < 0 or sum(in_bf16) > model.num_layers:
        raise UserError(
            f"fp8.num_layers_at_start_in_bf16 {in_bf16[0]} and num_layers_at_end_in_bf16 {in_bf16[1]}: "
            f"the model has {model.num_layers} layers"
        )
    if fp8.recipe is None:
        if any(in_bf16) or fp8.primary_weights:
            raise UserError(
                "fp8.num_layers_at_start_in_bf16, _at_end_ and primary_weights need an fp8.recipe"
            )
        return
    experts = model.experts
    has_experts = experts.num_moe_experts is not None
    if has_experts and (fp8.recipe not in OF_EXPERTS or fp8.primary_weights):
        raise UserError(
            f"fp8.recipe {fp8.recipe} {'with fp8.primary_weights ' * fp8.primary_weights}does not go with "
            f"experts yet: give one of {', '.join(OF_EXPERTS)} alone, or leave "
            "model.experts.num_moe_experts out"
        )
    if precision != "bf16":
        raise UserError(
            f"fp8.recipe {fp8.recipe} needs precision bf16 (it is {precision}): the rest stays bf16"
        )
    if any(in_bf16) and fp8.recipe == "delayed":
        raise UserError(
            "fp8.recipe delayed takes its maxima from all layers together and cannot leave some in bf16: "
            "use tensorwise, or no fp8.num_layers_at_start_in_bf16 and _at_end_"
        )
    if fp8.primary_weights and fp8.recipe == "mxfp8":
        raise UserError(
            "fp8.primary_weights with fp8.recipe mxfp8 is not supported: leave out fp8.primary_weights"
        )
    if not model.layer_norms:
        raise UserError(
            f"fp8.recipe {fp8.recipe} quantises what norms give, and model.layer_norms is off: train "
            "without fp8.recipe"
        )
    tp = parallel.tensor_model_parallel_size
    at_once, of = float(tokens), "data.seq_length x micro_batch_size"
    if (cp := parallel.context_parallel_size) > 1:
        at_once, of = at_once / cp, f"{of} / context_parallel_size"
    if parallel.tp_overlap == "halves":
        at_once, of = at_once / 2, f"{of} / 2 (of parallel.tp_overlap halves)"
    heads = model.num_attention_heads + 2 * model.kv_heads
    multiple = 32 if fp8.recipe == "mxfp8" else 16
    for name, size in (
        ("model.hidden_size", model.hidden_size),
        ("queries, keys and values of a rank", heads * model.head_dim // tp),
        ("attention's output of a rank", model.num_attention_heads * model.head_dim // tp),
        ("model.ffn_hidden_size of a rank", model.ffn_hidden_size // tp),
        ("model.experts.moe_ffn_hidden_size", experts.moe_ffn_hidden_size or 0),
        (
            "model.experts.moe_shared_expert_intermediate_size of a rank",
            (experts.moe_shared_expert_intermediate_size or 0) / tp,
        ),
        (of, at_once),
    ):
        if size % multiple:
            raise UserError(
                f"fp8.recipe {fp8.recipe}: {name}, {size:g}, is not a multiple of {multiple}. The GEMMs "
                "need that: change it, or train without fp8.recipe"
            )
    # Parallel kinds gather in bf16.
    if model.residual not in PARALLEL and parallel.sequence_parallel and tp > 1:
        of = f"{of} / tensor_model_parallel_size"
        _check_gathering(fp8.recipe, model.hidden_size, at_once / tp, of)


def _check_gathering(recipe: Fp8Recipe, hidden_size: int, tokens: float, of: str) -> None:
    """Checks that the ranks can gather in FP8. A rank quantises its own tokens before the all-gather.

    When they do not fill whole blocks, Transformer Engine does not fail: it warns, gathers in bf16, and
    quantises the inputs twice.
    """
    blocks = 128 if recipe == "blockwise" else 0
    multiple = blocks or (32 if recipe == "mxfp8" else 8)
    for size_of, size, needed in (
        (of, tokens, multiple),
        ("model.hidden_size", hidden_size, blocks or 1),
    ):
        if size % needed:
            raise UserError(
                f"fp8.recipe {recipe}: {size_of}, {size:g}, is not a multiple of {needed}. Sequence "
                "parallelism needs that to gather in FP8: change it, or train without "
                "parallel.sequence_parallel"
            )


def check_machine(fp8: Fp8Config, impl: Literal["local", "transformer_engine"]) -> None:
    """Checks that this machine can run an FP8 recipe.

    Args:
        fp8: the options.
        impl: the implementation of the layers that will be built.

    Raises:
        UserError: something is missing. The message names it.
    """
    if fp8.recipe is None:
        return
    if reason := missing(fp8.recipe):
        raise UserError(f"fp8.recipe {fp8.recipe} needs {reason}: see `megatron-ladder doctor`")
    if impl == "local":
        raise UserError(
            f"fp8.recipe {fp8.recipe} needs Transformer Engine; transformer_impl is local: set it to auto"
        )


def missing(recipe: Fp8Recipe) -> str:
    """What this machine lacks for a recipe: a package, a GPU or a newer torch; "" for nothing."""
    least, generation = CAPABILITIES[recipe]
    import torch  # imported here, so that the command line starts without it

    if find_spec("transformer_engine") is None:
        return "the transformer-engine package"
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
    if capability < least or (recipe == "mxfp8" and capability >= MXFP8_BELOW):
        found = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
        return f"a GPU of compute capability {least[0]}.{least[1]} ({generation}); found: {found}"
    cuda = tuple(int(part) for part in (torch.version.cuda or "0").split(".")[:2])
    if recipe == "blockwise" and cuda < BLOCKWISE_CUDA:
        return f"a torch built for CUDA 12.9 or later; found: CUDA {torch.version.cuda}"
    return ""


def config_fields(fp8: Fp8Config) -> dict[str, Any]:
    """megatron-core's configuration fields for FP8. Those for delayed are as in Megatron-LM's recipes."""
    if fp8.recipe is None:
        return {}
    per_tensor = fp8.recipe in ("delayed", "tensorwise")
    return {
        # hybrid: gradients are e5m2, which has a larger range. With one scale per block e4m3 is enough.
        "fp8": "hybrid" if per_tensor else "e4m3",
        "fp8_recipe": fp8.recipe,
        "fp8_param": fp8.primary_weights,
        "fp8_amax_history_len": 1024,
        "fp8_amax_compute_algo": "max",
        "first_last_layers_bf16": bool(
            fp8.num_layers_at_start_in_bf16 or fp8.num_layers_at_end_in_bf16
        ),
        "num_layers_at_start_in_bf16": fp8.num_layers_at_start_in_bf16,
        "num_layers_at_end_in_bf16": fp8.num_layers_at_end_in_bf16,
    }
