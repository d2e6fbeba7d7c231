"""Programs in place of SLURM's, which note how they are called."""

from pathlib import Path

import pytest

from pretrain import cli

FAKE = """#!/bin/bash
printf '%s\\0' "${0##*/}" "$@" >> CALLS; printf '\\n' >> CALLS
case ${0##*/} in
sbatch) [ -f REFUSE ] && { cat REFUSE >&2; exit 1; }; n=$(grep -ac ^sbatch CALLS); echo $((100 + n)) ;;
squeue) [ -f SQUEUE ] || exit 1; cat SQUEUE ;;
scontrol) echo "MaxArraySize            = 4" ;;
sacct) exit 1 ;;
esac
"""


class FakeSlurm:
    """Programs that note how they are called."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        text = FAKE
        for name in ("CALLS", "REFUSE", "SQUEUE"):
            text = text.replace(name, str(folder / name))
        for name in ("sbatch", "squeue", "scontrol", "scancel", "sacct"):
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)

    def calls(self, name: str) -> list[list[str]]:
        file = self.folder / "CALLS"
        lines = file.read_text().split("\0\n") if file.exists() else []
        return [words[1:] for words in (line.split("\0") for line in lines) if words[0] == name]


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    (tmp_path / "p.toml").write_text('partition = "cpu"\n')
    monkeypatch.chdir(tmp_path)
    return FakeSlurm(tmp_path / "bin")


def run(capsys, *argv: str, status: int = 0) -> str:
    try:
        ended: object = cli.main(list(argv))
    except SystemExit as error:
        ended = error.code
    output = capsys.readouterr()
    assert ended == status, output.err
    return output.out + output.err


TOKENIZE = ["data", "tokenize", "text", "--tokenizer", "t.model", "--output-dir", "tokens"]
TRAIN = ["train", "--preset", "debug", "--data.paths", "tokens", "--output-dir", "run"]
