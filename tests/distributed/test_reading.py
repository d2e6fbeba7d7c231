"""Which ranks read data, and that all ranks get the batches that one rank alone would read."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state

from megatron_ladder.config import ParallelConfig
from megatron_ladder.mcore_compat import initialize_model_parallel
from pretrain.config.data import DataConfig
from pretrain.config.presets import PRESETS
from pretrain.config.train import TrainConfig
from pretrain.data.batches import ValidationBatches, train_batches
from pretrain.data.checks import open_data
from pretrain.data.reading import RankBatches
from pretrain.data.sequences import MADE, train_sequences
from tests.data_sets import write_data_set
from tests.held_out import validation_sequences
from tests.ranks import run_ranks
from tests.runs import run_train

LAYOUTS = {
    "tp 2, pp 2": ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2),
    "tp 2, dp 2": ParallelConfig(tensor_model_parallel_size=2),
    "pp 4": ParallelConfig(pipeline_model_parallel_size=4),
    "cp 2, dp 2": ParallelConfig(context_parallel_size=2),
    "tp 2, cp 2": ParallelConfig(tensor_model_parallel_size=2, context_parallel_size=2),
}
NAMES = ("tokens", "labels", "loss_mask", "position_ids", "documents")


def config_for(place: Path, parallel: ParallelConfig, **data: Any) -> TrainConfig:
    paths = (place / "one", place / "two")
    config = replace(
        PRESETS["debug"](),
        data=DataConfig(paths=paths, seq_length=32, num_workers=0, **data),
        parallel=parallel,
        micro_batch_size=2,
        eval_sequences=7,
    )
    return replace(config, schedule=replace(config.schedule, train_steps=4, warmup_steps=0))


def received(place: Path, config: TrainConfig) -> dict[str, Any]:
    initialize_model_parallel(config.parallel, seed=0)
    before = torch.get_rng_state()
    folders, cache = open_data(config), place / "cache"
    of = {
        "data_parallel_rank": parallel_state.get_data_parallel_rank(),
        "data_parallel_size": parallel_state.get_data_parallel_world_size(),
    }
    data = RankBatches(config, folders, cache)
    found = list(data.received(data.training(consumed_samples=8)))
    attended = data.attended()
    held_out = {name: list(data.received(iter(read))) for name, read in data.validation()}
    drawn = torch.equal(before, torch.get_rng_state())
    sequences = train_sequences(config, folders, cache, made=True)
    alone = list(train_batches(sequences, config, consumed_samples=8, **of))
    splits = validation_sequences(config, folders, cache)
    return {
        "reads": data.reads,
        "random numbers": drawn,
        "training": (found, alone),
        "attended": attended,
        **{
            name: (held_out[name], ValidationBatches(splits[name], config, **of)) for name in splits
        },
    }


def make(place: Path, config: TrainConfig) -> None:
    folders = open_data(config)
    train_sequences(config, folders, place / "cache")
    validation_sequences(config, folders, place / "cache")


def attended(batches: list[dict[str, torch.Tensor]], reads: bool) -> float:
    """The mean number of tokens that are of a token's own document in its sequence."""
    if not reads or "documents" not in batches[0]:
        return 32
    documents = torch.cat([batch["documents"] for batch in batches])
    return (documents[:, :, None] == documents[:, None]).sum(-1).double().mean().item()


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rank_gets_what_one_alone_would_read(
    layout: str, apart: bool, tmp_path: Path
) -> None:
    place = tmp_path / "place"
    for number, name in enumerate(("one", "two")):
        write_data_set(place / name, seed=number, document_length=40)
    config = config_for(place, LAYOUTS[layout], attend_across_documents=not apart)
    run_ranks(1, make, place, config, tmp_path=tmp_path)
    ranks = run_ranks(4, received, place, config, tmp_path=tmp_path)
    needs = [True] * 4 if apart or layout != "pp 4" else [True, False, False, True]
    first_of_its_group = {"pp 4": [True] * 4, "tp 2, cp 2": [True, False, False, False]}.get(
        layout, [True, False, True, False]
    )
    for number, rank in enumerate(ranks):
        assert rank["reads"] == (needs[number] and first_of_its_group[number])
        assert rank["random numbers"]  # unchanged on all ranks alike: dropout draws from them
        assert rank["attended"] == pytest.approx(attended(rank["training"][1], rank["reads"]))
        for name in ("training", "one", "two"):
            found, alone = rank[name]
            assert len(found) == len(alone) > 0
            for mine, theirs in zip(found, alone, strict=True):
                if not needs[number]:
                    assert mine == {}
                    continue
                for key in NAMES:
                    assert (key in mine) == (key in theirs)
                    if key in theirs:
                        assert torch.equal(mine[key], theirs[key])
                        assert mine[key].dtype == theirs[key].dtype


def test_stages_without_tokens_train_as_one_rank_does(tmp_path: Path) -> None:
    data = write_data_set(tmp_path / "data")

    def losses(name: str, stages: int, steps: int, *more: str) -> list[float]:
        run = tmp_path / name
        options = ["--preset", "debug", "--data.paths", str(data), "--output-dir", str(run), *more]
        options += ["--data.seq-length", "32", "--micro-batch-size", "2", "--no-async-save"]
        options += ["--schedule.train-steps", str(steps), "--schedule.warmup-steps", "0"]
        options += ["--eval-interval", "1", "--eval-sequences", "3"]
        options += ["--parallel.pipeline-model-parallel-size", str(stages)]
        statuses, output = run_train(options, tmp_path / "log", timeout_s=200)
        assert statuses == [0] * stages, output
        lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        return [m["loss"] for m in lines if m["kind"] in ("train", "validation")]

    losses("weights", 1, 1)  # each stage would draw other ones
    start = ["--init-from", str(tmp_path / "weights")]
    one, four = (losses(f"run{n}", n, 2, *start) for n in (1, 4))
    assert len(one) == 5  # and a validation before the first step
    assert four == pytest.approx(one, rel=1e-5)


def test_a_deleted_index_file_is_made_again_by_the_next_start(tmp_path: Path) -> None:
    """The files are not looked for one by one: where one is missing, the note that all are there goes."""
    for name in ("one", "two"):
        write_data_set(tmp_path / name, seed=len(name))
    config = config_for(tmp_path, ParallelConfig())
    run_ranks(1, make, tmp_path, config, tmp_path=tmp_path)
    cache, folders = tmp_path / "cache", open_data(config)
    for kind in ("shuffle_index", "dataset_index"):
        (cache / MADE).touch()
        for file in cache.glob(f"*-train-{kind}.npy"):
            file.unlink()
        with pytest.raises(FileNotFoundError, match=kind):
            train_sequences(config, folders, cache, made=True)[0]
        assert not (cache / MADE).exists()
