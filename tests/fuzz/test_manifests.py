"""No JSON or TOML that a command reads makes it end in a traceback, or writes outside of its folder."""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.dataset.blend import Blend, blend
from data_prep.dataset.folder import open_data_set
from data_prep.dataset.inspect import Inspect, inspect
from data_prep.dataset.verify import Verify, verify
from data_prep.errors import UserError as DataError
from megatron_ladder.errors import UserError
from megatron_ladder.hf.end_ids import end_ids
from megatron_ladder.hf.from_hf import read_hf_config, to_model_config
from pretrain.config.presets import PRESETS
from pretrain.config.train import load_config, to_dict
from pretrain.data.folders import keep_facts, kept_facts, open_folder
from pretrain.data.tokenizer_facts import added_to_pieces
from pretrain.evaluation.results import results_by_step, table
from pretrain.model.staleness import saved_staleness
from pretrain.report.runs import read_run
from pretrain.run.bad_step import bad_steps_of
from pretrain.run.checkpoint_files import damage
from pretrain.run.folder import started_from
from slurm.errors import UserError as JobError
from slurm.jobs.folders import read_job
from slurm.submit.profile import load_profile
from slurm.watch.status import status
from tests.data_sets import write_data_set
from tests.fuzz.growth import bounded_memory
from tests.fuzz.mutations import odd_bytes, odd_json

AT_ONCE = 5
SEEDS = st.integers(0, 2**63)
REFUSED = (UserError, DataError, JobError, OSError)
MODEL = {
    **{"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "num_hidden_layers": 2},
    **{"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 100},
    **{
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "head_dim": 16,
    },
    **{"tie_word_embeddings": True, "eos_token_id": [1, 2], "pad_token_id": None, "num_labels": 2},
    **{"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    **{"layer_types": ["full_attention"] * 2, "use_sliding_window": False, "sliding_window": None},
}
JOB = {
    **{
        "command": ["train", "--preset", "tiny"],
        "workdir": "/",
        "launcher": "slurm",
        "asked": {"nodes": 1},
    },
    **{
        "submitted_by": ["sbatch"],
        "unix_time": 1.0,
        "after": ["7"],
        "job_id": None,
        "runner": None,
    },
}
STATUS = {
    **{"state": "training", "step": 3, "train_steps": 9, "tokens": 99, "loss": 1.5, "starts": 2},
    **{
        "tokens_per_second": 9.5,
        "eta_s": 60.0,
        "last_checkpoint": None,
        "reason": "",
        "unix_time": 1.0,
    },
}
START = {"kind": "start", "step": 0, "residual": "ladder", "train_steps": 9, "device": "cpu"}
TRAIN = {
    **{
        "kind": "train",
        "step": 1,
        "tokens": 64,
        "time": 1.0,
        "loss": 5.0,
        "grad_norm": 1.0,
        "mfu": None,
    },
    **{"learning_rate": 0.1, "tokens_per_second": 1.0, "tflops_per_gpu": 1.0, "memory_gib": 1.0},
}
VALIDATION = {
    **{"kind": "validation", "step": 1, "tokens": 64, "time": 1.0, "dataset": "a", "loss": 5.0},
    **{"perplexity": 2.0},
}
BAD = {"step": 7, "reason": "a loss of NaN", "action": "skip", "passed_over": [7, 7]}
RESULTS = {
    **{"format": "megatron-ladder-evaluation", "version": 1, "step": 3, "unix_time": 1.0},
    "results": [
        {"task": "perplexity", "data": "a", "split": "test", "metrics": {"loss": 2.0}, "tokens": 9},
        {"task": "last_word", "metrics": {"acc": 0.5, "acc_stderr": 0.1}, "items": 4},
    ],
}
FILES = {"files": {"__0_0.distcp": {"bytes": 1, "sha256": "0" * 64}}}
PROFILE = 'partition = "a"\ngpus_per_node = 8\nmodules = ["x"]\n[environment]\nA = "1"\n'


@pytest.fixture(scope="module", autouse=True)
def memory() -> Iterator[None]:
    with bounded_memory():
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("json")


def tried(act: Callable[[], Any]) -> Any:
    """What it gives, or None where it refused in words that can be printed."""
    try:
        return act()
    except REFUSED as error:
        message = str(error) if not isinstance(error, OSError) else str(error.strerror)
        assert message and len(message) < 5000
        assert not any(ord(c) < 32 and c != "\n" for c in message), ascii(message)
        return None


def odd(seed: int, right: Any) -> Iterator[bytes]:
    rng = random.Random(seed)
    for _ in range(AT_ONCE):
        yield odd_json(rng, right)


@pytest.fixture(scope="module")
def data(place: Path) -> tuple[Path, dict[str, Any]]:
    path = write_data_set(place / "in" / "data", train_documents=4, validation_documents=2)
    return path, json.loads((path / "manifest.json").read_text())


def check_data(path: Path, manifest: bytes) -> None:
    (path / "manifest.json").write_bytes(manifest)
    run = path.parents[1] / "out" / "run"
    run.mkdir(parents=True, exist_ok=True)
    folder = tried(lambda: open_folder(path))
    if folder is not None:  # whatever it says, the run's files are written where they belong
        keep_facts(run, [folder])
        found = {p.relative_to(run.parent).as_posix() for p in run.parent.rglob("*") if p.is_file()}
        assert found == {"run/data/0/manifest.json", "run/data/0/tokenizer.model"}
        assert (run / "data/0/tokenizer.model").read_bytes() == b"a tokenizer"
        assert kept_facts(run)[0].tokenizer == folder.tokenizer
    # Both packages read the same; `data` commands also show who made it.
    ours = tried(lambda: open_data_set(path))
    if folder is None and ours is not None:
        assert tried(lambda: verify(Verify(path, 1))) is None or "mask_bytes" in str(manifest)
    if folder is not None and ours is None:
        assert "created_by" in message_of(lambda: open_data_set(path))


def message_of(act: Callable[[], Any]) -> str:
    with pytest.raises(REFUSED) as error:
        act()
    return str(error.value)


@given(SEEDS)
def test_data_sets(data: tuple[Path, dict[str, Any]], seed: int) -> None:
    path, right = data
    for manifest in odd(seed, right):
        check_data(path, manifest)


@given(SEEDS)
def test_data_commands(data: tuple[Path, dict[str, Any]], place: Path, seed: int) -> None:
    path, right = data
    for manifest in odd(seed, right):
        (path / "manifest.json").write_bytes(manifest)
        tried(lambda: inspect(Inspect(path)).encode())
        tried(lambda: blend(Blend((path,), place / "blend.json")).encode())
        (place / "blend.json").unlink(missing_ok=True)


@given(SEEDS)
def test_kept_manifests(data: tuple[Path, dict[str, Any]], place: Path, seed: int) -> None:
    kept = place / "kept"
    (kept / "data" / "0").mkdir(parents=True, exist_ok=True)
    for manifest in odd(seed, {**data[1], "name": "a"}):
        (kept / "data" / "0" / "manifest.json").write_bytes(manifest)
        tried(lambda: kept_facts(kept))


@given(SEEDS)
def test_configurations_of_runs(place: Path, seed: int) -> None:
    debug = PRESETS["debug"]()
    for text in odd(seed, to_dict(debug)):
        (place / "config.json").write_bytes(text)
        config = tried(lambda: load_config(place / "config.json"))
        if config is not None:
            assert config.model.num_parameters(embeddings=False) > 0
            config.model.layer_residuals()
        tried(lambda: load_config(place / "config.json", onto=debug))


@given(SEEDS)
def test_blends_and_phases(place: Path, seed: int) -> None:
    phases = [{"from_tokens": 1000, "weights": [0.5, 0.5]}]
    data = {"paths": ["a", "b"], "weights": [0.5, 0.5], "phases": phases}
    for text in odd(seed, {"data": data, "seed": 3}):
        (place / "blend.json").write_bytes(text)
        tried(lambda: load_config(place / "blend.json", onto=PRESETS["debug"]()))
    (place / "blend.json").unlink()


@given(SEEDS)
def test_configurations_of_models(place: Path, seed: int) -> None:
    folder = place / "model"
    folder.mkdir(exist_ok=True)
    for text in odd(seed, MODEL):
        for name in ("config.json", "generation_config.json"):
            (folder / name).write_bytes(text)
        tried(lambda: end_ids(folder))
        tried(lambda: to_model_config(read_hf_config(folder), folder))


@given(SEEDS)
def test_tokenizers_of_models(place: Path, piece: Path, seed: int) -> None:
    added = {"<a>": 300, "<b>": 301}
    right = {"added_tokens_decoder": {"300": {"content": "<a>"}}, "bos_token": "<s>"}
    for config, tokens in zip(odd(seed, right), odd(seed + 1, added), strict=True):
        (piece / "tokenizer_config.json").write_bytes(config)
        tried(lambda: added_to_pieces(piece))
        (piece / "added_tokens.json").write_bytes(tokens)
        tried(lambda: added_to_pieces(piece))
        (piece / "added_tokens.json").unlink()


@pytest.fixture(scope="module")
def piece(place: Path) -> Path:
    """A folder with a SentencePiece model."""
    import sentencepiece

    folder = place / "pieces"
    folder.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a few words to learn from", "and a few more"] * 20),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=20,
        minloglevel=2,
    )
    return folder


@given(SEEDS)
def test_jobs(place: Path, seed: int) -> None:
    output = place / "output"
    job = output / "slurm" / "1"
    job.mkdir(parents=True, exist_ok=True)
    for text, said in zip(odd(seed, JOB), odd(seed + 1, STATUS), strict=True):
        (output / "status.json").write_bytes(said)
        (job / "job.json").write_bytes(text)
        found = tried(lambda: read_job(job))
        if found is None or found.job_id is None:  # SLURM is not asked
            printed = tried(lambda: status([output]))
            assert printed is None or printed.encode()


@given(SEEDS)
def test_profiles(place: Path, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(AT_ONCE):
        text = odd_bytes(rng, PROFILE.encode())
        if rng.random() < 0.1:
            text = b"a=" + rng.choice((b"[", b"{a=", b"1")) * rng.choice((100, 5000, 50_000))
        (place / "profile.toml").write_bytes(text)
        tried(lambda: load_profile(place / "profile.toml"))


@given(SEEDS)
def test_what_runs_wrote(place: Path, seed: int) -> None:
    run = place / "run"
    for name in ("bad_steps", "evaluations", "checkpoint"):
        (run / name).mkdir(parents=True, exist_ok=True)
    begun = {"kind": "start", "unix_time": 1.0, "before": STATUS}
    for number, said in enumerate(odd(seed, STATUS)):
        rng = random.Random(seed + number)
        lines = [START, TRAIN, VALIDATION, {"kind": "bad_step", **BAD}]
        (run / "metrics.jsonl").write_bytes(
            b"".join(json.dumps(line).encode() + b"\n" for line in lines)
            + odd_json(rng, rng.choice(lines))
            + b"\n"
        )
        (run / "starts.jsonl").write_bytes(odd_json(rng, begun) + b"\n")
        (run / "status.json").write_bytes(said)
        (run / "bad_steps" / "step_7.json").write_bytes(odd_json(rng, BAD))
        (run / "evaluations" / "a.json").write_bytes(odd_json(rng, RESULTS))
        (run / "checkpoint" / "manifest.json").write_bytes(odd_json(rng, FILES))
        facts = {"data": "a", "tokens": 9, "standard": 2.0, "alone": [2.0, 2.5]}
        (run / "staleness.json").write_bytes(odd_json(rng, facts))
        (run / "initial.json").write_bytes(odd_json(rng, {"checkpoint": "step_00000001", **FILES}))
        tried(lambda: read_run(run, "a"))
        tried(lambda: bad_steps_of(run))
        tried(lambda: [table(results) for results in results_by_step(run).values()])
        tried(lambda: damage(run / "checkpoint", read=True))
        tried(lambda: saved_staleness(run).order())
        tried(lambda: started_from(run))


@given(st.binary(max_size=300))
def test_any_bytes(data: tuple[Path, dict[str, Any]], place: Path, text: bytes) -> None:
    path = place / "bytes.json"
    path.write_bytes(text)
    tried(lambda: load_config(path))
    tried(lambda: load_profile(path))
    check_data(data[0], text)
