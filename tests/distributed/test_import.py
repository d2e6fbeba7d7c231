"""Models of other projects: imported, they give transformers' logits at every layout; exported again, they
are what they were, bit by bit."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_ladder.config import ParallelConfig
from megatron_ladder.mcore_compat import (
    build_gpt_model,
    initialize_model_parallel,
    transformer_config,
)
from pretrain.config.train import load_config
from pretrain.convert.export import export_run
from pretrain.convert.import_model import import_model
from pretrain.run.checkpoint import load_initial_weights
from tests.ranks import run_ranks
from tests.unit.hf import foreign

LENGTH = 24


def tokens() -> Tensor:
    return torch.randint(0, foreign.VOCAB, (3, LENGTH), generator=torch.Generator().manual_seed(5))


def logits(run: Path, parallel: ParallelConfig) -> Tensor | None:
    """Of the imported checkpoint, [b, s, vocabulary]; on ranks of the last stage."""
    config = load_config(run / "config.json")
    parallel_state.destroy_model_parallel()
    initialize_model_parallel(parallel, seed=0)
    model = build_gpt_model(config.model, transformer_config(config.model, parallel))
    load_initial_weights(run / "checkpoints" / "step_00000000", {"model": model[0]})

    def forward(batches, model):
        batch = next(batches)
        output = model(batch, torch.arange(LENGTH).expand_as(batch), None)
        return output, lambda output: (output.sum(), {"logits": output.detach()})

    model[0].eval()
    with torch.no_grad():
        outputs = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=[iter([tokens()])],
            model=model,
            num_microbatches=1,
            seq_length=LENGTH,
            micro_batch_size=3,
            forward_only=True,
        )
    if not outputs:
        return None
    local = outputs[0]["logits"].contiguous()
    parts = [torch.empty_like(local) for _ in range(parallel.tensor_model_parallel_size)]
    group = parallel_state.get_tensor_model_parallel_group()
    torch.distributed.all_gather(parts, local, group=group)
    return torch.cat(parts, -1)[..., : config.model.vocab_size]


def all_logits(runs: list[Path], layouts: list[ParallelConfig]) -> list[list[Tensor | None]]:
    return [[logits(run, fitting(run, layout)) for run in runs] for layout in layouts]


def fitting(run: Path, parallel: ParallelConfig) -> ParallelConfig:
    """The layout; of a model with experts, its tensor-parallel ranks also divide these."""
    tp = parallel.tensor_model_parallel_size
    if tp == 1 or load_config(run / "config.json").model.experts.num_moe_experts is None:
        return parallel
    return replace(parallel, sequence_parallel=True, expert_model_parallel_size=tp)


def tensors(folder: Path) -> dict[str, Tensor]:
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each model of foreign.MODELS: a folder as published, and one as imported."""
    folder = tmp_path_factory.mktemp("foreign")
    for number, name in enumerate(foreign.MODELS):
        # One file or many.
        how = {"max_shard_size": "20KB"} if number % 2 else {}
        foreign.save(foreign.make(name), folder / "published" / name, **how)
        import_model(folder / "published" / name, folder / "runs" / name)
    return folder


def test_logits_are_those_of_transformers(imported: Path, tmp_path: Path) -> None:
    two = ParallelConfig(tensor_model_parallel_size=2)
    layouts = {1: [ParallelConfig()], 2: [two, ParallelConfig(pipeline_model_parallel_size=2)]}
    runs = [imported / "runs" / name for name in foreign.MODELS]
    expected = {}
    for name in foreign.MODELS:
        model = AutoModelForCausalLM.from_pretrained(imported / "published" / name)
        with torch.no_grad():
            expected[name] = model.float().eval()(tokens()).logits
    for ranks, some in layouts.items():
        by_rank = run_ranks(ranks, all_logits, runs, some, tmp_path=tmp_path)
        for number, layout in enumerate(some):
            for place, (name, right) in enumerate(expected.items()):
                found = [r[number][place] for r in by_rank if r[number][place] is not None]
                assert found, (name, layout)
                for one in found:
                    difference = (one - right).abs().max()
                    assert difference < 1e-4, f"{name}, {layout}: {difference}"


@pytest.mark.parametrize("name", foreign.MODELS)
def test_a_round_trip_changes_nothing(name: str, imported: Path, tmp_path: Path) -> None:
    published = imported / "published" / name
    export_run(imported / "runs" / name, tmp_path / "again", None, "5GB")
    before, after = tensors(published), tensors(tmp_path / "again")
    assert set(before) == set(after)
    for key, tensor in before.items():
        assert torch.equal(tensor, after[key]), key
        assert tensor.dtype == after[key].dtype
    first, second = (
        AutoModelForCausalLM.from_pretrained(f) for f in (published, tmp_path / "again")
    )
    with torch.no_grad():
        assert torch.equal(first(tokens()).logits, second(tokens()).logits) or (
            # Mistral without a window is Llama: other kernels may round in another way.
            name == "mistral" and torch.allclose(first(tokens()).logits, second(tokens()).logits)
        )
    for key in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "again" / key).read_bytes() == (published / key).read_bytes()
    ours, theirs = first.config.to_dict(), second.config.to_dict()
    # Settings that change nothing in these models.
    ignored = {"_name_or_path", "architectures", "model_type", "sliding_window", "head_dim"}
    if "moe" in name:  # one field for another; the loss of the balance is training's own
        ignored |= {"decoder_sparse_step", "mlp_only_layers", "use_sliding_window"}
    if "window" in name or "layer_types" in name:
        ignored = {"_name_or_path"}
    if "mscale" in name:  # it becomes an attention_factor
        ignored.add("rope_parameters")
    differing = {k for k in ours if k in theirs and ours[k] != theirs[k]}
    assert differing <= ignored


@pytest.mark.parametrize(
    "name",
    [
        *("qwen2, untied", "qwen3, untied", "llama, untied, llama3"),
        "qwen3-moe, three experts, an MLP",
    ],
)
def test_ladder_layers_have_the_same_weights(name: str, imported: Path, tmp_path: Path) -> None:
    """What becomes ladder is another model with the same tensors; the first layers do not change."""
    import_model(imported / "published" / name, tmp_path / "ladder", "last:2")
    export_run(tmp_path / "ladder", tmp_path / "exported", None, "5GB")
    before, after = tensors(imported / "published" / name), tensors(tmp_path / "exported")
    assert all(torch.equal(before[key], after[key]) for key in before)
    ladder = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    assert ladder.config.ladder_layers == 2
    standard = AutoModelForCausalLM.from_pretrained(imported / "published" / name)
    with torch.no_grad():
        ours, theirs = (
            m(tokens(), output_hidden_states=True).hidden_states for m in (ladder, standard)
        )
    torch.testing.assert_close(ours[2], theirs[2], atol=1e-4, rtol=0)
    assert (ours[3] - theirs[3]).abs().max() > 1e-2
    for parallel in (
        ParallelConfig(),
        ParallelConfig(tensor_model_parallel_size=2),
        ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True),
    ):
        ranks = parallel.tensor_model_parallel_size
        layout = fitting(tmp_path / "ladder", parallel)
        for right in run_ranks(ranks, logits, tmp_path / "ladder", layout, tmp_path=tmp_path):
            with torch.no_grad():
                torch.testing.assert_close(right, ladder(tokens()).logits, atol=1e-4, rtol=0)
