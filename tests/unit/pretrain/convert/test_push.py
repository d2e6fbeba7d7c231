"""`export --push`: what the hub is asked for, and that a folder is never lost."""

from pathlib import Path

import pytest
from huggingface_hub.errors import HTTPError

from pretrain.cli import main
from pretrain.convert import export, push
from pretrain.convert.import_model import import_model
from tests.unit.hf import foreign

CALLS: list[tuple] = []


class Hub:
    """Stands in for HfApi: keeps what it is asked, and fails as it is told."""

    error: Exception | None = None

    def create_repo(self, name: str, **options: object) -> None:
        CALLS.append(("create_repo", name, options))

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> "Hub":
        if self.error is not None:
            raise self.error
        CALLS.append(("upload_folder", repo_id, sorted(p.name for p in folder_path.iterdir())))
        return self

    commit_url = "https://huggingface.co/me/model/commit/1"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    foreign.save(foreign.make("qwen2, tied"), folder / "published")
    import_model(folder / "published", folder / "run", "all")
    return folder / "run"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    CALLS.clear()
    monkeypatch.setattr(push, "HfApi", Hub)
    monkeypatch.setattr(push, "get_token", lambda: "hf_token")
    monkeypatch.setattr(export, "verify_export", lambda *_: "not verified here")
    return Hub


def test_nothing_is_uploaded_unless_asked(hub, run: Path, tmp_path: Path) -> None:
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    assert CALLS == []


@pytest.mark.parametrize("private", [True, False])
def test_the_folder_is_uploaded(hub, private: bool, run: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    options = ["--push", "me/model", "--license", "llama3.2", *["--private"] * private]
    assert main(["export", str(run), str(out), *options]) == 0
    names = sorted(path.name for path in out.iterdir())
    assert [
        ("create_repo", "me/model", {"private": private, "exist_ok": True}),
        ("upload_folder", "me/model", names),
    ] == CALLS
    assert Hub.commit_url in capsys.readouterr().out
    card = (out / "README.md").read_text()
    assert "\nlicense: llama3.2\n" in card
    assert "a Qwen2ForCausalLM, with its weights." in card
    assert "biases of queries, keys and values (no others), as in Qwen2." in card
    assert "expect poor text" in card


@pytest.mark.parametrize("error", [HTTPError("503 Service Unavailable"), OSError("no route")])
def test_the_folder_stays_when_the_hub_fails(
    hub, error: Exception, run: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr(Hub, "error", error)
    out = tmp_path / "out"
    assert main(["export", str(run), str(out), "--push", "me/model"]) == 2
    said = capsys.readouterr().err
    assert f"--push me/model failed: {error}. {out} is complete and stays" in said
    assert f"`hf upload me/model {out}`" in said
    assert "Traceback" not in said
    assert (out / "model.safetensors").is_file()


def test_without_a_token_it_says_how_to_log_in(
    hub, run: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr(push, "get_token", lambda: None)
    out = tmp_path / "out"
    assert main(["export", str(run), str(out), "--push", "me/model"]) == 2
    said = capsys.readouterr().err
    assert "not logged in to Hugging Face: run `hf auth login`, or set HF_TOKEN" in said
    assert (out / "model.safetensors").is_file()
    assert CALLS == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--push", "model"], "--push model: give USER/NAME"),
        (["--push", "a/b/c"], "--push a/b/c: give USER/NAME"),
        (["--push", "me/mo del"], "give USER/NAME"),
        (["--private"], "--private needs --push USER/NAME"),
        (["--license", "Apache 2: yes"], "--license Apache 2: yes: give one of the hub's names"),
    ],
)
def test_mistakes_are_said_before_work(
    hub, options: list[str], said: str, run: Path, tmp_path: Path, capsys
) -> None:
    assert main(["export", str(run), str(tmp_path / "out"), *options]) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert CALLS == []
