"""Blends that change in mid-run: what each step reads, and what may be changed."""

import json
from dataclasses import replace
from fractions import Fraction
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ladder.errors import UserError
from pretrain.config.data import DataConfig, Phase
from pretrain.config.past import Past, PastBatchSize, PastBlend
from pretrain.config.presets import PRESETS
from pretrain.config.train import TrainConfig, load_config, save_config
from pretrain.data.batches import train_batches
from pretrain.data.blends import check_blends, check_phases, describe, interleave
from pretrain.data.checks import open_data
from pretrain.data.folders import keep_facts
from pretrain.data.phased import PhasedSequences
from pretrain.data.sequences import Sequences, train_sequences
from pretrain.index.cache import _facts
from pretrain.run.folder import write_config
from pretrain.start.going_on.changes import with_past
from tests.data_sets import write_data_set

BATCH, LENGTH, STEPS = 8, 64, 20
STEP = BATCH * LENGTH  # tokens
PER_EPOCH = {"a": 49, "b": 14, "c": 9}  # sequences
PHASES = (Phase(6 * STEP, (1.0, 2.0, 0.0)), Phase(13 * STEP, (0.0, 1.0, 3.0)))


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    """Three data sets; all but the first are gone through several times."""
    folder = tmp_path_factory.mktemp("data")
    documents = {"a": 100, "b": 30, "c": 20}
    return tuple(
        write_data_set(folder / name, train_documents=count, document_length=32, seed=number)
        for number, (name, count) in enumerate(documents.items())
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def config_for(
    paths: tuple[Path, ...], phases: tuple[Phase, ...] = PHASES, weights=(3.0, 1.0, 0.0), **data
) -> TrainConfig:
    config = PRESETS["debug"]()
    data = DataConfig(
        paths=paths, weights=weights, phases=phases, seq_length=LENGTH, num_workers=0, **data
    )
    schedule = replace(config.schedule, train_steps=STEPS)
    return replace(config, data=data, global_batch_size=BATCH, schedule=schedule)


def sequences(config: TrainConfig, cache: Path) -> PhasedSequences:
    return train_sequences(config, open_data(config), cache)


# --- shares ---


@given(
    st.lists(st.integers(0, 1000), min_size=1, max_size=12).filter(any),
    st.integers(1, 400),
)
@settings(deadline=None)
def test_every_stretch_has_its_shares_within_one_sequence(weights: list[int], count: int) -> None:
    shares = tuple(weight / sum(weights) for weight in weights)
    order = interleave(shares, count)
    for number, weight in enumerate(weights):
        taken = np.cumsum(order == number)
        asked = [Fraction(weight * (n + 1), sum(weights)) for n in range(count)]
        assert all(abs(t - a) < 1.000001 for t, a in zip(taken.tolist(), asked, strict=True))
        assert weight or not taken[-1]
    half = count // 2
    assert np.array_equal(interleave(shares, half), order[:half])  # whatever follows


# --- what is read ---


def test_each_phase_takes_its_share_and_goes_on_where_the_one_before_left(paths, cache) -> None:
    config = config_for(paths)
    places = sequences(config, cache)._places
    taken = np.zeros(3, int)
    bounds = [0, 6 * BATCH, 13 * BATCH, STEPS * BATCH]
    weights = [(3, 1, 0), (1, 2, 0), (0, 1, 3)]
    for (begin, end), asked in zip(pairwise(bounds), weights, strict=True):
        part = places[begin:end]
        for number in range(3):
            numbers = part["sequence"][part["data_set"] == number]
            expected = (end - begin) * asked[number] / sum(asked)
            assert abs(len(numbers) - expected) <= 1
            assert numbers.tolist() == list(range(taken[number], taken[number] + len(numbers)))
            taken[number] += len(numbers)
    # b and c begin anew at least once.
    assert taken[1] > 2 * PER_EPOCH["b"]
    assert taken[2] > 3 * PER_EPOCH["c"]


def test_up_to_the_first_change_it_is_the_run_without_phases(paths, cache) -> None:
    for weights, used in (((3.0, 1.0, 0.0), 2), ((1.0, 0.0, 0.0), 1)):
        config = config_for(paths, weights=weights)
        data = replace(config.data, phases=(), paths=paths[:used], weights=weights[:used])
        plain = sequences(replace(config, data=data), cache)
        assert not isinstance(plain, PhasedSequences)
        ours = sequences(config, cache)
        for number in range(6 * BATCH):
            assert torch.equal(ours[number]["tokens"], plain[number]["tokens"])


def test_what_follows_changes_nothing_before_it(paths, cache) -> None:
    """Other weights, another beginning, one phase less or more: only after the point of change."""
    ours = sequences(config_for(paths), cache)
    first, second = PHASES
    for phases, same in {
        (first, replace(second, weights=(1.0, 1.0, 1.0))): 13,
        (first, replace(second, from_tokens=17 * STEP)): 13,
        (first,): 13,
        (first, second, Phase(19 * STEP, (1.0, 0.0, 0.0))): 19,
        (replace(first, from_tokens=2 * STEP), second): 2,
        (): 6,
    }.items():
        others = sequences(
            config_for(paths, phases, (3.0, 1.0, 0.0))
            if phases
            else config_for(paths[:2], (), (3.0, 1.0)),
            cache,
        )
        tokens = [[s[i]["tokens"] for i in range(STEPS * BATCH)] for s in (ours, others)]
        equal = [torch.equal(a, b) for a, b in zip(*tokens, strict=True)]
        assert all(equal[: same * BATCH])
        assert not all(equal[same * BATCH : (same + 1) * BATCH])


def tokens_of(config: TrainConfig, cache: Path) -> list[torch.Tensor]:
    ours = sequences(config, cache)
    return [ours[i]["tokens"] for i in range(config.samples_after(config.train_steps))]


@pytest.mark.parametrize("weights", [(3.0, 1.0, 0.0), (1.0, 0.0, 0.0)])
def test_a_longer_or_shorter_run_reads_the_same_before(paths, cache, weights) -> None:
    """Another number of steps, of batches, another blend: what the steps so far have read stays."""
    used = sum(map(bool, weights))
    config = config_for(paths[:used], (), weights[:used])
    ours = tokens_of(config, cache)
    drawn = Past(drawn=STEPS * BATCH)
    for changed, same in {
        replace(config, past=drawn, schedule=replace(config.schedule, train_steps=50)): STEPS,
        replace(config, past=drawn, schedule=replace(config.schedule, train_steps=7)): 7,
        replace(
            config,
            past=replace(drawn, batch_sizes=(PastBatchSize(10, BATCH),)),
            global_batch_size=4 * BATCH,
        ): STEPS,
    }.items():
        theirs = tokens_of(changed, cache)
        both = list(zip(ours, theirs, strict=False))
        assert len(both) == same * BATCH
        assert all(torch.equal(a, b) for a, b in both)
        # What follows goes through a data set once more, and no sequence of it twice.
        of_a = sequences(changed, cache)
        if isinstance(of_a, PhasedSequences):
            numbers = of_a._places["sequence"][of_a._places["data_set"] == 0]
            assert numbers.tolist() == list(range(len(numbers)))
    # The order is drawn otherwise where a longer run begins: that is why it is kept.
    anew = tokens_of(replace(config, schedule=replace(config.schedule, train_steps=50)), cache)
    assert not all(torch.equal(a, b) for a, b in zip(ours, anew, strict=False))


def test_a_run_that_changed_twice_reads_the_same_before_each(paths, cache) -> None:
    config = config_for(paths, (), (3.0, 1.0, 2.0))
    once = Past(
        blends=(PastBlend(1, (3.0, 1.0, 2.0)),),
        blends_to=7,
        batch_sizes=(PastBatchSize(7, BATCH),),
        drawn=STEPS * BATCH,
    )
    first = replace(
        config, past=once, global_batch_size=12, data=replace(config.data, weights=(1.0, 1.0, 1.0))
    )
    longer = replace(first, schedule=replace(config.schedule, train_steps=40))
    twice = replace(
        once,
        blends=(*once.blends, PastBlend(8, (1.0, 1.0, 1.0))),
        blends_to=15,
        batch_sizes=(*once.batch_sizes, PastBatchSize(15, 12)),
    )
    second = replace(
        longer, past=twice, global_batch_size=4, data=replace(config.data, weights=(1.0, 0.0, 9.0))
    )
    whole, one, two = (tokens_of(c, cache) for c in (config, longer, second))
    assert all(torch.equal(a, b) for a, b in zip(whole[: 7 * BATCH], one, strict=False))
    samples = 7 * BATCH + 8 * 12
    assert all(torch.equal(a, b) for a, b in zip(one[:samples], two, strict=False))
    assert len(two) == samples + 25 * 4
    assert not torch.equal(one[samples + 1], two[samples + 1])


def test_a_data_set_is_gone_through_before_it_begins_anew(paths, cache) -> None:
    """c joins late: each of its epochs holds every document once, but what no sequence's end took."""
    config = config_for(paths)
    ours = sequences(config, cache).data_sets[2]
    tokens = np.fromfile(paths[2] / "train.bin", np.uint16)
    documents = {tokens[i : i + 32].tobytes() for i in range(0, len(tokens), 32)}
    assert len(documents) == 20
    orders = []
    for epoch in ours.datasets:
        assert len(epoch) == PER_EPOCH["c"] == (20 * 32 - 1) // LENGTH
        seen = [d for i in range(len(epoch)) for d, _, _ in epoch._pieces(i)]
        whole = [
            (document, start)
            for i in range(len(epoch))
            for document, start, count in epoch._pieces(i)
            if count > 1  # the last label is the next sequence's first token
        ]
        assert len(set(whole)) == len(whole)
        assert len(set(seen)) >= 18
        orders.append(seen)
    assert len(orders) >= 4
    assert orders[0] != orders[1]


@given(st.integers(0, STEPS - 1), st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4]))
@settings(deadline=None, max_examples=30)
def test_a_step_reads_the_same_from_every_position_at_every_size(
    whole_run: tuple[TrainConfig, PhasedSequences, list[torch.Tensor]],
    step: int,
    size: int,
    micro: int,
) -> None:
    config, dataset, expected = whole_run
    if BATCH % (size * micro):
        return
    config = replace(config, micro_batch_size=micro)
    ranks = [
        train_batches(
            dataset,
            config,
            data_parallel_rank=rank,
            data_parallel_size=size,
            consumed_samples=step * BATCH,
        )
        for rank in range(size)
    ]
    found = [
        tokens
        for parts in zip(*ranks, strict=True)
        for batch in parts
        for tokens in batch["tokens"]
    ]
    assert torch.equal(torch.stack(found), torch.stack(expected[step * BATCH :]))


@pytest.fixture(scope="module")
def whole_run(paths, cache) -> tuple[TrainConfig, PhasedSequences, list[torch.Tensor]]:
    config = config_for(paths)
    dataset = sequences(config, cache)
    return config, dataset, [dataset[i]["tokens"] for i in range(len(dataset))]


def test_packing_options_hold_in_every_phase(
    paths, cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Documents apart, fill in the middle and masks are those of the data set's own sequences."""
    monkeypatch.setattr("pretrain.data.fim.find_tokens", lambda *_: (500, 501, 502))
    masked = write_data_set(tmp_path / "masked", document_length=32, seed=9)
    np.zeros(60 * 32, np.uint8).tofile(masked / "train.mask")
    manifest = json.loads((masked / "manifest.json").read_text())
    manifest["splits"]["train"] |= {"mask_bytes": 60 * 32, "trained_tokens": 0}
    (masked / "manifest.json").write_text(json.dumps(manifest))
    config = config_for((*paths[:2], masked), attend_across_documents=False, fim_rate=1.0)
    ours = sequences(config, tmp_path / "cache")
    changed = 0
    for number, place in enumerate(ours._places):
        item = ours[number]
        assert set(item) == {"tokens", "labels", "position_ids", "loss_mask", "documents"}
        is_masked = place["data_set"] == 2
        assert bool(item["loss_mask"].any()) != is_masked
        is_filled_in = bool(set(item["tokens"].tolist()) & {500, 501, 502})
        assert not (is_masked and is_filled_in)  # data with masks is left as it is
        changed += is_filled_in
    assert changed > 80
    torch.utils.data.default_collate([ours[0], ours[STEPS * BATCH - 1]])
    first_epoch, *_ = ours.data_sets[2].datasets
    assert isinstance(first_epoch, Sequences)


def test_index_files_are_made_again_for_another_plan(paths) -> None:
    config = config_for(paths)
    folders = open_data(config)
    others = [config_for(paths, phases) for phases in (PHASES[:1], PHASES[::-1], ())]
    assert all(_facts(other, folders) != _facts(config, folders) for other in others)
    assert "phases" not in _facts(others[-1], folders)  # a run of before finds its own


# --- what is refused ---


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        (
            [Phase(STEP, (1.0, 1.0))],
            r"phases\[0\]\.weights has 2 values, 1.0 1.0, for 3 data.paths",
        ),
        ([Phase(STEP, (0.0, 0.0, 0.0))], "weights must be 0 or more, and not all of them 0"),
        ([Phase(STEP, (1.0, -1.0, 0.0))], "weights must be 0 or more"),
        ([Phase(STEP, (1.0, float("nan"), 0.0))], "nan"),
        ([Phase(STEP, (1.0, "x", 0.0))], "has 3 values, 1.0 x 0.0, for 3"),
        ([Phase(0, (1.0, 1.0, 1.0))], "from_tokens is 0: give a whole number of tokens, 1 or more"),
        ([Phase(1.5, (1.0, 1.0, 1.0))], "from_tokens is 1.5: give a whole number"),
        ([Phase(2 * STEP, (1.0,) * 3), Phase(STEP, (1.0,) * 3)], r"phases\[1\].* at step 2, and"),
        ([Phase(9, (1.0,) * 3), Phase(10, (1.0,) * 3)], r"at least one step \(512 tokens\)"),
        ([Phase(STEPS * STEP, (1.0,) * 3)], "at step 21, after the end of the run, which has 20"),
    ],
)
def test_phases_that_mean_nothing_are_refused(paths, phases, message) -> None:
    def check() -> None:
        config = config_for(paths, tuple(phases))
        check_blends(config)
        check_phases(config)

    with pytest.raises(UserError, match=message):
        check()


def test_weights_at_the_start_are_refused_too(paths) -> None:
    with pytest.raises(UserError, match=r"data\.weights is 0.0 0.0 0.0: .* not all of them 0"):
        check_blends(config_for(paths, weights=(0.0,) * 3))
    with pytest.raises(UserError, match=r"is never read\. Give one above 0 for each"):
        check_phases(config_for(paths, phases=()))  # nothing begins later


def test_phases_are_saved_and_read_again(paths, tmp_path: Path) -> None:
    config = config_for(paths)
    save_config(config, tmp_path / "config.json")
    assert load_config(tmp_path / "config.json") == config
    (tmp_path / "some.json").write_text('{"data": {"phases": [5]}}')
    with pytest.raises(UserError, match=r"data\.phases\[0\] is 5: it must be an object of Phase's"):
        load_config(tmp_path / "some.json", onto=config)


def began(config: TrainConfig) -> None:
    """The folder of a run that has a checkpoint of step 10."""
    assert config.output_dir is not None
    write_config(config)
    keep_facts(config.output_dir, open_data(config))
    (config.output_dir / "checkpoints/step_00000010").mkdir(parents=True)


@pytest.fixture
def stopped(paths, tmp_path: Path) -> TrainConfig:
    """A run that has a checkpoint of step 10, in its second blend."""
    config = replace(config_for(paths), output_dir=tmp_path / "run")
    began(config)
    return config


def resume(config: TrainConfig, **data) -> TrainConfig:
    config = replace(config, data=replace(config.data, **data))
    return with_past(config, open_data(config))[0]


def test_what_is_still_to_come_may_change(stopped, paths, tmp_path: Path) -> None:
    first, second = PHASES
    for data in (
        {},
        {"phases": (first,)},
        {"phases": (first, replace(second, from_tokens=11 * STEP))},
        {"phases": (first, replace(second, weights=(1.0, 0.0, 0.0)))},
        {"weights": (6.0, 2.0, 0.0)},  # the same shares
    ):
        assert resume(stopped, **data).past == Past()
    joined = write_data_set(tmp_path / "d")
    phases = (Phase(6 * STEP, (1.0, 2.0, 0.0, 0.0)), Phase(13 * STEP, (0.0, 0.0, 0.0, 1.0)))
    four = resume(stopped, paths=(*paths, joined), weights=(3.0, 1.0, 0.0, 0.0), phases=phases)
    assert four.past == Past()


def planned(config: TrainConfig) -> str:
    return describe(config, open_data(config))


def test_what_was_trained_on_stays(stopped) -> None:
    """Where a plan says otherwise of steps that are trained, it holds from the next step on."""
    first, second = PHASES
    before = "Blend of steps 1 to 6: a 75.0%, b 25.0%\nBlend of steps 7 to 10: a 33.3%, b 66.7%\n"
    other = resume(stopped, phases=(replace(first, weights=(1.0, 1.0, 0.0)), second))
    assert planned(other) == (
        f"{before}Blend of steps 11 to 13: a 50.0%, b 50.0%\nBlend of steps 14 to 20: b 25.0%, c 75.0%"
    )
    earlier = resume(stopped, phases=(first, replace(second, from_tokens=9 * STEP)))
    assert planned(earlier) == f"{before}Blend of steps 11 to 20: b 25.0%, c 75.0%"
    no_phases = resume(stopped, weights=(1.0, 1.0, 2.0), phases=())
    assert planned(no_phases) == f"{before}Blend of steps 11 to 20: a 25.0%, b 25.0%, c 50.0%"


def test_a_change_that_changes_nothing_to_come_is_refused(stopped, paths) -> None:
    first, second = PHASES
    refused = partial(pytest.raises, UserError)
    with refused(
        match=r"trained to step 10 \(5,120 tokens\) with the weights 3 1 0 from step 1 on; "
    ):
        resume(stopped, phases=(replace(first, from_tokens=5 * STEP), second))
    with refused(match=r"now say 2 1 0 from step 1 on; .* which is the same for the steps to come"):
        resume(stopped, weights=(2.0, 1.0, 0.0))
    with refused(match="give these first and in this order"):
        resume(stopped, paths=paths[::-1])
    with refused(match="give these first"):
        resume(stopped, paths=paths[:2], weights=(3.0, 1.0), phases=())


def test_a_run_by_tokens_may_get_phases(paths, tmp_path: Path) -> None:
    """Its weights were none: those that it had are kept."""
    config = replace(config_for(paths[:2], phases=(), weights=None), output_dir=tmp_path / "run")
    began(config)
    assert resume(config, phases=(Phase(10 * STEP, (1.0, 1.0)),)).past == Past()
    later = {"paths": paths, "phases": (Phase(10 * STEP, (1.0, 1.0, 1.0)),)}
    by_tokens = PastBlend(1, (3200.0, 960.0, 0.0))
    assert resume(config, **later).past == Past(blends=(by_tokens,), blends_to=10)
    assert resume(config, **later, weights=(3200.0, 960.0, 0.0)).past == Past()


def test_before_the_first_checkpoint_all_may_change(stopped) -> None:
    (stopped.output_dir / "checkpoints/step_00000010").rmdir()
    resume(stopped, weights=(1.0, 1.0, 1.0), phases=())


def test_the_plan_is_said(paths) -> None:
    config = config_for(paths)
    assert describe(config, open_data(config)).split("\n") == [
        "Blend of steps 1 to 6: a 75.0%, b 25.0%",
        "Blend of steps 7 to 13: a 33.3%, b 66.7%",
        "Blend of steps 14 to 20: b 25.0%, c 75.0%",
    ]
