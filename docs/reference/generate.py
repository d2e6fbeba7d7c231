"""Writes command-line.md and configuration.md from the commands themselves.

    python docs/reference/generate.py

tests/unit/test_options.py compares the pages with what the commands say now.
"""

import argparse
import contextlib
import dataclasses
import io
import re
import typing
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import tyro

from pretrain.cli import COMMANDS, USAGE, main
from pretrain.config.changes import may_change
from pretrain.config.data import Phase
from pretrain.config.presets import PRESETS
from pretrain.config.train import TrainConfig

HERE = Path(__file__).parent
NOTE = "<!-- Written by `python docs/reference/generate.py`: change the options' help, not this page. -->"
# Commands of commands, where tyro does not know them.
BELOW = {"report": ("depth",), "bench": ("trace", "kinds", "plan")}


def pages() -> dict[str, str]:
    """The text of each page, by its file's name."""
    return {"command-line.md": command_line(), "configuration.md": configuration()}


def command_line() -> str:
    """Every command with its options."""
    parts = [
        f"# Command line\n\n{NOTE}",
        "Every command takes `-h` and `--help`. `...` after a type: several values, separated by spaces.\n"
        "A command ends with 0 when it has succeeded, with 2 when it refuses what was asked, and\n"
        "with 141 when nobody reads its output any more (`| head`). A training has more:\n"
        "[exit statuses](../guides/faults.md#exit-statuses).",
        f"```text\n{USAGE}```",
    ]
    for name in COMMANDS:
        parts += _command([name])
        for below in BELOW.get(name, ()):
            parts += _command([name, below])
    return "\n\n".join(parts) + "\n"


def _command(name: list[str]) -> Iterator[str]:
    yield f"## {' '.join(name)}"
    asked, printed = _asked_of_tyro(name)
    if asked is None:
        yield f"```text\n{printed}```"
        return
    if name == ["train"]:
        yield f"```text\nusage: {asked['prog']}\n```"
        yield from _prose(asked["description"])
        yield "All other options are fields of [the run's configuration](configuration.md)."
        return
    parser = _parser(asked)
    yield from _prose(parser.description or "")
    for group in parser._action_groups:
        for action in group._group_actions:
            if not isinstance(action.choices, dict):  # of commands below this one
                continue
            for below, of_below in action.choices.items():
                yield f"### {' '.join(name)} {below}"
                yield from _prose(of_below.description or "")
                yield from _tables(of_below)
            return
    yield from _tables(parser)


def _asked_of_tyro(name: list[str]) -> tuple[dict[str, Any] | None, str]:
    """What a command's `--help` hands to tyro, and what it prints where it does without tyro."""
    asked: list[dict[str, Any]] = []

    def record(f: Any, **options: Any) -> None:
        asked.append({"f": f, **options})
        raise SystemExit(0)

    printed = io.StringIO()
    with mock.patch.object(tyro, "cli", record), contextlib.redirect_stdout(printed):
        try:
            status = main([*name, "--help"])
        except SystemExit as end:
            status = end.code
    assert status == 0, f"{name} --help ended with {status}"
    assert asked or printed.getvalue(), f"{name} --help said nothing"
    return (asked[0] if asked else None), printed.getvalue()


def _parser(asked: dict[str, Any]) -> argparse.ArgumentParser:
    options = {
        key: asked[key] for key in ("prog", "description", "default", "config") if key in asked
    }
    with warnings.catch_warnings():
        # tyro means to take this out some day; there is no other public way to a command's options.
        warnings.simplefilter("ignore", DeprecationWarning)
        return tyro.extras.get_parser(asked["f"], **options)


def _tables(parser: argparse.ArgumentParser) -> Iterator[str]:
    rows = [_row(action) for action in _actions(parser)]
    if rows:
        yield _table(("option", "type", "default", "meaning"), rows)


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for group in parser._action_groups:
        for action in group._group_actions:
            if action.dest != "help":
                yield action


def _row(action: argparse.Action) -> tuple[str, str, str, str]:
    if action.option_strings:
        name = ", ".join(f"`{option}`" for option in action.option_strings)
    else:  # tyro's names of options of a command below another begin with the parent's
        name = f"`{action.dest.split('.')[-1].replace('-', '_').upper()}`"
    meaning, default = _help(action)
    kind = "flag" if action.nargs == 0 else _type(str(action.metavar))
    if type(action).__name__ == "_AppendAction":  # tyro's own copy of argparse's
        kind += ", may be repeated"
    return name, kind, default, meaning


def _help(action: argparse.Action) -> tuple[str, str]:
    """An option's help, and the default that tyro says at its end."""
    text = " ".join((action.help or "").split())
    found = re.fullmatch(r"(.*?) ?\((required|repeatable|default: ?[^()]*)\)", text)
    assert found, f"{action.dest}: help without a default: {text!r}"
    default = found[2].removeprefix("default:").removeprefix("repeatable").strip()
    quoted = default if default == "required" else f"`{default}`" if default else "none"
    return _plain(found[1]), quoted


def _type(metavar: str) -> str:
    """`{None}|{a,b}` as "`a`, `b` or `None`"; `[PATH [PATH ...]]` as "`PATH ...`"."""
    alternatives = []
    for part in metavar.split("|"):
        some = re.search(r"\[\.\.\.\]|\[\w+ \[\w+ \.\.\.\]\]", part)
        words = re.search(r"[\w,./-]+(?: \w+)*", part)
        assert words, metavar
        names = [f"`{word}`" for word in words[0].split(",")]
        if some:
            names[-1] = names[-1] + " ..." if len(names) > 1 else names[-1][:-1] + " ...`"
        alternatives += names
    if "`None`" in alternatives:
        alternatives = [name for name in alternatives if name != "`None`"] + ["`None`"]
    return ", ".join(alternatives[:-1]) + " or " * (len(alternatives) > 1) + alternatives[-1]


def configuration() -> str:
    """Every field of a run's configuration, and what the presets make of them."""
    parts = [
        f"# Configuration of a run\n\n{NOTE}",
        "A field is an option of `train`: `model.num_layers` is `--model.num-layers`, and "
        "`parallel.sequence_parallel` is\n`--parallel.sequence-parallel` or "
        "`--parallel.no-sequence-parallel`.\n"
        "A run keeps its fields in `config.json`, which `--config` reads. `train` starts from a "
        "[preset](#presets).\nWhat the preset does not set has the default of these tables.\n"
        "Resume: yes where a run may be resumed with another value, for the steps to come. "
        "[Change a run](../guides/change-a-run.md)\nsays when, and why others may not change.",
    ]
    fields = dict(_fields(TrainConfig))
    actions = {
        action.option_strings[0].removeprefix("--").replace("-", "_"): action
        for action in _actions(_parser({"f": TrainConfig}))
    }
    groups = _parser({"f": TrainConfig})._action_groups
    about = {group.title.split()[0]: group.description for group in groups if group.title}
    for section in dict.fromkeys(name.rpartition(".")[0] for name in fields):
        parts.append(f"## {section or 'The run'}")
        parts += _prose(about.get(section) or "")
        names = [name for name in fields if name.rpartition(".")[0] == section]
        rows = []
        for name in names:
            if name in actions:
                _, kind, default, meaning = _row(actions[name])
            else:
                assert name == "data.phases", f"{name} is no option: say here how it is given"
                kind, default, meaning = "list", "none", "Only in a file: see [below](#phases)."
            rows.append((f"`{name}`", kind, default, "yes" if may_change(name) else "no", meaning))
        parts.append(_table(("field", "type", "default", "resume", "meaning"), rows))
        if section == "data":
            parts.append("### phases")
            parts += _prose(_parser({"f": Phase}).description or "")
            parts.append(
                "`data.phases` is a list of objects in a JSON file for `--config`. "
                "`megatron-ladder data blend --then` writes one."
            )
            of_phase = [_row(action) for action in _actions(_parser({"f": Phase}))]
            parts.append(
                _table(
                    ("field", "type", "meaning"),
                    [
                        (name.replace("--", "").replace("-", "_"), kind, meaning)
                        for name, kind, _, meaning in of_phase
                    ],
                )
            )
    return "\n\n".join([*parts, *_presets(fields)]) + "\n"


def _presets(defaults: dict[str, Any]) -> Iterator[str]:
    yield "## Presets"
    yield (
        "What each preset sets. An empty cell is the default above. [train](command-line.md#train) says "
        "what each is for.\n`adapt`, `adapt-control`, `extend` and `side-tune` take the model of "
        "`--init-from` in place of the `model` fields here."
    )
    made = {name: dict(_fields(preset())) for name, preset in PRESETS.items()}
    names = list(made)
    for some in (names[i : i + 4] for i in range(0, len(names), 4)):
        rows = []
        for field, default in defaults.items():
            values = [made[name][field] for name in some]
            cells = ["" if value == default else f"`{value}`" for value in values]
            if any(cells):
                rows.append((f"`{field}`", *cells))
        yield _table(("field", *some), rows)


def _fields(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values of a configuration; of a class the defaults."""
    is_class = isinstance(config, type)
    hints = typing.get_type_hints(config if is_class else type(config))
    sections = []
    for field in dataclasses.fields(config):
        if field.name == "past":  # no option, `train` writes it: formats.md
            continue
        if dataclasses.is_dataclass(hint := hints[field.name]):
            sections.append((field.name, hint if is_class else getattr(config, field.name)))
        else:
            yield prefix + field.name, field.default if is_class else getattr(config, field.name)
    for name, section in sections:
        yield from _fields(section, f"{prefix}{name}.")


def _prose(text: str) -> Iterator[str]:
    """Paragraphs; lines that are indented stay as they are."""
    for paragraph in text.strip("\n").split("\n\n"):
        if paragraph.startswith("  "):
            yield f"```text\n{paragraph}\n```"
        elif paragraph:
            yield _plain(" ".join(paragraph.split()))


def _plain(text: str) -> str:
    """Text that Markdown leaves alone, but for `code`."""
    parts = re.split(r"(`[^`]*`)", text)
    # A backslash before < is shown on the site, and what follows is taken for HTML.
    return "".join(
        p if p.startswith("`") else re.sub(r"([|*\[\]])", r"\\\1", p).replace("<", "&lt;")
        for p in parts
    )


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    assert not any("|" in cell.replace("\\|", "") for row in rows for cell in row), rows
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    for name, text in pages().items():
        (HERE / name).write_text(text)
        print(HERE / name)
