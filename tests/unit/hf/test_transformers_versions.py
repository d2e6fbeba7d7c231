"""Both ends of the range of transformers: an exported folder answers under the oldest as it does here."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from tests.unit.hf import answers, tiny
from tests.unit.hf.test_export import export

ROOT = Path(__file__).parents[3]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
(RANGE,) = (d[12:] for d in PROJECT["dependencies"] if d.startswith("transformers"))
OLDEST = re.fullmatch(r">=([\d.]+),<6", RANGE)[1]
# Besides it, what it wants older than today's, and what those need.
OLDER = ["huggingface_hub<2", "tokenizers<0.23.1", "httpx", "httpcore", "certifi"]


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("oldest")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    pip += ["--no-compile", "--no-deps", "--retries", "1", "--timeout", "15", "--target", folder]
    done = subprocess.run([*pip, f"transformers=={OLDEST}", *OLDER], capture_output=True, text=True)
    if "from versions: none" in done.stderr:
        pytest.skip(f"pip reaches no index to install transformers {OLDEST} from")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning")
@pytest.mark.timeout(600)
def test_the_oldest_answers_the_same(packages, tmp_path, bpe_file):
    kinds = ("layers 0 and 2", "parallel", "parallel-ladder 0 and 2")
    models = [tiny.model(**tiny.KINDS[kind], rope_parameters=tiny.LLAMA3) for kind in kinds]
    models.append(tiny.model(**tiny.WINDOWS, rope_parameters=tiny.YARN))
    folders = [export(m, tmp_path / str(i), bpe_file) for i, m in enumerate(models)]
    subprocess.run(
        [sys.executable, "-I", answers.__file__, packages, *folders],
        cwd=tmp_path,
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")},
        check=True,
        timeout=300,
    )
    version, *results = torch.load(tmp_path / "results.pt")
    assert version.startswith(OLDEST)
    for model, found in zip(models, results, strict=True):
        expected = answers.answers(model)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        first, *others = [tokens for name, tokens in expected.items() if "cache" in name]
        assert len(first[0, 25:].unique()) > 3
        assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("name", ["modelling/modeling_ladder.py", "model_card.md.jinja"])
def test_the_range_is_said_where_the_model_goes(name):
    words = (ROOT / "megatron_ladder" / "hf" / name).read_text().split()
    assert f"transformers {RANGE}" in " ".join(words).replace("(", "")
