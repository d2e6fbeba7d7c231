"""Configuration dataclasses as plain values of JSON, and back. Each value must have its field's type."""

import dataclasses
import math
import types
import typing
from pathlib import Path
from typing import Any, Literal

from megatron_ladder.errors import UserError
from megatron_ladder.json_files import is_whole, is_word, named, short

_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a string",
    Path: "a path",
    type(None): "null",
}
_MOST = (1 << 63) - 1


def to_dict(config: Any) -> dict[str, Any]:
    """A config dataclass as plain JSON values; `from_dict` is the inverse."""

    def plain(value: Any) -> Any:
        if isinstance(value, Path):
            return str(value)
        if isinstance(value, tuple):
            return [plain(v) for v in value]
        return to_dict(value) if dataclasses.is_dataclass(value) else value

    return {f.name: plain(v) for f in dataclasses.fields(config) for v in [getattr(config, f.name)]}


def from_dict(cls: Any, values: Any, where: str = "config") -> Any:
    """A `cls` made from `to_dict`'s output, which may come from a file that a stranger wrote.

    Raises:
        UserError: `cls` does not have a field, or a value is not of its field's type or out of range.
    """
    if not isinstance(values, dict):
        raise UserError(
            f"{where} is {short(values)}: it must be an object of {cls.__name__}'s fields"
        )
    hints = typing.get_type_hints(cls)
    if unknown := sorted(set(values) - set(hints)):
        raise UserError(f"{where}: unknown field {', '.join(map(named, unknown[:5]))}")
    for field in dataclasses.fields(cls):
        has_default = not field.default is field.default_factory is dataclasses.MISSING
        if field.name not in values and not has_default:
            raise UserError(f"{where}.{field.name} is missing")
    return cls(**{k: _restore(hints[k], v, f"{where}.{k}") for k, v in values.items()})


def _restore(hint: Any, value: Any, where: str) -> Any:
    """`value` as a field of this type holds it."""
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where)
    for option in _options(hint):
        if typing.get_origin(option) is tuple and isinstance(value, list):
            inner = typing.get_args(option)
            wanted = inner[:1] * len(value) if inner[-1] is Ellipsis else inner
            if len(wanted) == len(value):
                return tuple(
                    _restore(kind, item, f"{where}[{number}]")
                    for number, (kind, item) in enumerate(zip(wanted, value, strict=True))
                )
        elif _fits(option, value):
            return Path(value) if option is Path else value
    raise UserError(
        f"{where} is {short(value)}: it must be {' or '.join(map(_in_words, _options(hint)))}"
    )


def _options(hint: Any) -> tuple[Any, ...]:
    """The types of a union, or the one type."""
    is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    return typing.get_args(hint) if is_union else (hint,)


def _fits(kind: Any, value: Any) -> bool:
    if typing.get_origin(kind) is Literal:
        return any(
            type(value) is type(choice) and value == choice for choice in typing.get_args(kind)
        )
    if kind is float:  # infinity turns some limits off; NaN is neither below nor above a limit
        return is_whole(value, -_MOST, _MOST) or (type(value) is float and not math.isnan(value))
    if kind is int:
        return is_whole(value, -_MOST, _MOST)
    if kind in (str, Path):
        return is_word(value)
    return type(value) is kind


def check_numbers(config: Any, name: str = "") -> None:
    """Refuses numbers that `from_dict` would not read again: NaN, and whole numbers beyond 64 bits.

    Raises:
        UserError: a field of the dataclass, or of one within it, has such a number.
    """
    for field in dataclasses.fields(config):
        value, where = getattr(config, field.name), f"{name}{field.name}"
        if dataclasses.is_dataclass(value):
            check_numbers(value, f"{where}.")
        for number in value if isinstance(value, tuple) else (value,):
            is_wrong = type(number) is int and not -_MOST <= number <= _MOST
            if is_wrong or (type(number) is float and math.isnan(number)):
                raise UserError(f"{where} is {short(number)}: give a usual number")


def _in_words(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return " or ".join(map(str, typing.get_args(kind)))
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)
        return "a list" if inner[-1] is Ellipsis else f"a list of {len(inner)}"
    return _WORDS[kind]


def differences(old: Any, new: Any) -> dict[str, tuple[Any, Any]]:
    """The fields that differ: their dotted names, each with the old and the new value."""
    a, b = _flat(to_dict(old)), _flat(to_dict(new))
    return {k: (a.get(k), b.get(k)) for k in sorted({*a, *b}) if a.get(k) != b.get(k)}


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, dict):
            out |= _flat(item, f"{prefix}{key}.")
        else:
            out[prefix + key] = item
    return out
