"""The reference pages list every option as the commands have it now."""

import argparse
import importlib.util
from pathlib import Path
from unittest import mock

import pytest
import tyro

from pretrain.cli import main

FOLDER = Path(__file__).parents[2] / "docs/reference"
REWRITE = (
    "An option has changed. Look whether you meant to, then: python docs/reference/generate.py"
)


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    spec = importlib.util.spec_from_file_location("generate", FOLDER / "generate.py")
    assert spec is not None and spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    with mock.patch.dict("os.environ", COLUMNS="40"):  # the pages do not depend on the terminal
        return generate.pages()


@pytest.mark.parametrize("name", ["command-line.md", "configuration.md"])
def test_the_page_is_as_the_commands_are(name: str, pages: dict[str, str]) -> None:
    committed, now = (FOLDER / name).read_text().splitlines(), pages[name].splitlines()
    assert committed == now, REWRITE


def test_what_train_reads_before_its_configuration_is_in_its_usage(pages: dict[str, str]) -> None:
    """argparse reads these options of `train`, which tyro does not know."""
    read: set[str] = set()

    def record(parser: argparse.ArgumentParser, argv: list[str]) -> tuple[object, list[str]]:
        read.update(parser._option_string_actions)
        return real(parser, argv)

    real = argparse.ArgumentParser.parse_known_args
    with (
        mock.patch.object(argparse.ArgumentParser, "parse_known_args", record),
        mock.patch.object(tyro, "cli", side_effect=SystemExit(0)),
        pytest.raises(SystemExit),
    ):
        main(["train", "--plan-only", "--help"])
    assert {"--preset", "--plan-only"} <= read
    section = pages["command-line.md"].partition("\n## train\n")[2].partition("\n## ")[0]
    others = {option for option in read if f"[{option}" not in section}
    assert others == {"--init-from", "--branch-from"}
    assert all(f"`{name}`" in pages["configuration.md"] for name in ("init_from", "branch_from"))
