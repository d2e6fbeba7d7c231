"""A sweep's file: which fields of the configuration are fixed, which are swept, and over which sizes.

docs/guides/sweep.md describes it. Fields have their dotted names of docs/reference/configuration.md,
written as TOML's tables. Two more stand beside them: `tokens`, and `tokens_per_parameter`, which counts
parameters without embeddings.
"""

import difflib
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ladder.errors import UserError
from megatron_ladder.json_files import is_word, named, refuse_pipe, short
from pretrain.config.presets import OF_A_MODEL, PRESETS
from pretrain.config.train import TrainConfig, load_config

MOST_BYTES = 1 << 20
TABLES = ("preset", "config", "fields", "axes", "sizes", "leave_out")
TOKENS, PER_PARAMETER = "tokens", "tokens_per_parameter"
SIZE, HELD_OUT = "size", "held_out"
OURS = {
    "output_dir": "each run has a folder of its own, in --output-dir",
    "past": "`train` writes it",
    "branch_from": "a sweep's runs begin at their first step",
    "schedule.train_tokens": f"give {TOKENS} or {PER_PARAMETER}",
}

Fields = dict[str, Any]
"""Values by dotted name."""


@dataclass(frozen=True)
class Sweep:
    """What a sweep's file says."""

    defaults: TrainConfig
    fields: Fields
    axes: dict[str, list[Any]]
    sizes: dict[str, Fields]
    """By name. In place of an axis' value a size may have another one, or a list of them."""
    held_out: frozenset[str]
    """Sizes whose losses are predicted and not fitted."""
    leave_out: tuple[dict[str, list[Any]], ...]
    """A run that has one of the values of each of a table's fields is not trained."""


def read_sweep(path: Path) -> Sweep:
    """Reads a sweep's file.

    Raises:
        UserError: it is missing, no TOML, or has a table that does not exist or is of another form.
    """
    try:
        return _sweep(_toml(path))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _toml(path: Path) -> dict[str, Any]:
    try:
        refuse_pipe(path, "a sweep's file")
        with path.open("rb") as file:
            text = file.read(MOST_BYTES + 1)
        if len(text) > MOST_BYTES:
            raise UserError(f"it has more than {MOST_BYTES:,} bytes")
        return tomllib.loads(text.decode())
    except FileNotFoundError:
        raise UserError("it does not exist: give a sweep's TOML file") from None
    except IsADirectoryError:
        raise UserError("it is a folder: give a sweep's TOML file") from None
    except RecursionError:
        raise UserError("it is not TOML: too many levels") from None
    except ValueError as error:  # no TOML, not UTF-8, or a number of thousands of digits
        if isinstance(error, UserError):
            raise
        raise UserError(f"it is not TOML: {error}") from None


def _sweep(values: dict[str, Any]) -> Sweep:
    for name in values:
        if name not in TABLES:
            near = difflib.get_close_matches(name, TABLES, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(TABLES)}"
            raise UserError(f"no entry {named(name)}: {hint}")
    axes = _flat(values.get("axes", {}), "axes")
    for name, choices in axes.items():
        _check_choices(name, choices)
    fields = _flat(values.get("fields", {}), "fields")
    if both := sorted(fields.keys() & axes.keys()):
        raise UserError(f"{both[0]} is in [fields] and in [axes]: give it in one of them")
    sizes, held_out = _sizes(values.get("sizes", {}))
    if not axes and not sizes:
        raise UserError("nothing is swept: give [axes], or [sizes.NAME] tables, or both")
    return Sweep(
        defaults=_defaults(values),
        fields=fields,
        axes=axes,
        sizes=sizes,
        held_out=held_out,
        leave_out=_left_out(values.get("leave_out", []), {*axes, *_names(sizes)}),
    )


def _defaults(values: dict[str, Any]) -> TrainConfig:
    preset, config = values.get("preset"), values.get("config")
    if preset is None and config is None:
        raise UserError(
            'nothing says which defaults to start from: give preset = "NAME" '
            f'({", ".join(n for n in PRESETS if n not in OF_A_MODEL)}) or config = "FILE"'
        )
    if preset is not None and (not isinstance(preset, str) or preset not in PRESETS):
        near = difflib.get_close_matches(str(preset), PRESETS, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise UserError(f"no preset {short(preset)}{hint}: choose one of {', '.join(PRESETS)}")
    if preset in OF_A_MODEL:
        raise UserError(f"preset {preset} starts from a model that exists: a sweep's runs do not")
    default = PRESETS[preset]() if preset is not None else None
    if config is None:
        assert default is not None
        return default
    if not isinstance(config, str):
        raise UserError(f"config is {short(config)}: it must be the path of a JSON file")
    return load_config(Path(config), onto=default)


def _flat(table: Any, where: str, prefix: str = "") -> Fields:
    """TOML's tables as dotted names. TOML has no null: the string None is, as on the command line."""
    if not isinstance(table, dict):
        raise UserError(f"{where} is {short(table)}: it must be a table of fields")
    found: Fields = {}
    for name, value in table.items():
        if not is_word(name) or "." in name:
            raise UserError(f"{where} has no field {named(name)}")
        dotted = prefix + name
        for ours, why in OURS.items():
            if dotted == ours or dotted.startswith(ours + "."):
                raise UserError(f"{where}.{dotted} is not to be given: {why}")
        if isinstance(value, dict):
            found |= _flat(value, where, f"{dotted}.")
        else:
            found[dotted] = None if value == "None" else value
    return found


def _check_choices(name: str, choices: Any) -> None:
    if not isinstance(choices, list) or not choices:
        raise UserError(f"axes.{name} is {short(choices)}: it must be a list of values")
    for number, choice in enumerate(choices):
        if isinstance(choice, dict):
            raise UserError(f"axes.{name} is a list of tables: give values")
        if choice in choices[:number]:
            raise UserError(f"axes.{name} has {short(choice)} twice")
    choices[:] = [None if choice == "None" else choice for choice in choices]


def _sizes(table: Any) -> tuple[dict[str, Fields], frozenset[str]]:
    if not isinstance(table, dict) or not all(isinstance(v, dict) for v in table.values()):
        raise UserError("sizes must be tables with names: [sizes.small], then its fields")
    sizes, held_out = {}, set()
    for name, fields in table.items():
        fields = dict(fields)
        held = fields.pop(HELD_OUT, False)
        if type(held) is not bool:
            raise UserError(f"sizes.{named(name)}.{HELD_OUT} is {short(held)}: give true or false")
        if held:
            held_out.add(name)
        sizes[name] = _flat(fields, f"sizes.{named(name)}")
    if sizes and len(held_out) == len(sizes):
        raise UserError(f"every size is {HELD_OUT}: then there is nothing to fit")
    return sizes, frozenset(held_out)


def _names(sizes: dict[str, Fields]) -> set[str]:
    return {SIZE, *(name for fields in sizes.values() for name in fields)}


def _left_out(tables: Any, known: set[str]) -> tuple[dict[str, list[Any]], ...]:
    if not isinstance(tables, list):
        raise UserError("leave_out must be [[leave_out]] tables")
    found = []
    for table in tables:
        conditions = _flat(table, "leave_out")
        if not conditions:
            raise UserError("a [[leave_out]] table is empty: it would leave out every run")
        if unknown := sorted(conditions.keys() - known):
            raise UserError(
                f"leave_out.{unknown[0]} is not swept: it must be an axis, a field of the sizes, or {SIZE}"
            )
        found.append({name: v if isinstance(v, list) else [v] for name, v in conditions.items()})
    return tuple(found)
