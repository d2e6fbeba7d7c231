"""The text of a record: a JSON object, or a row of a table."""

import re
from typing import Any

from data_prep.read.chat import Conversation, pieces_of
from data_prep.read.reading import BadLines, Reading, replaces

SURROGATE = re.compile("[\ud800-\udfff]")


class Named(str):
    """A text with its document's id."""

    __slots__ = ("name",)
    name: str

    def __new__(cls, text: str, name: str) -> "Named":
        named = super().__new__(cls, text)
        named.name = name
        return named


def fields_of(value: Any, reading: Reading) -> tuple[list[Any], str | None]:
    """What the columns of a JSON object or a row hold, and None; or nothing, and which one it lacks."""
    if not isinstance(value, dict):
        hint = " (a JSON array? one object a line is needed)" if isinstance(value, list) else ""
        return [], f"not a JSON object{hint}"
    found = []
    for name in reading.columns:
        inner: Any = value
        for key in (name,) if name in value else name.split("."):
            if not isinstance(inner, dict) or key not in inner:
                return [], f"no field {name!r}"
            inner = inner[key]
        found.append(inner)
    return found, None


def text_of(found: list[Any], reading: Reading) -> tuple[str, str | None]:
    """The text of a record, and None; or "", and why it has no text.

    Args:
        found: what its columns hold. A text that is null is empty; where all are, so is the document.
    """
    identity = found[-1] if reading.id_field else None
    if isinstance(identity, dict | list) or (reading.id_field and identity is None):
        return "", f"field {reading.id_field!r} is no string or number"
    values = found[: len(reading.fields)]
    if reading.chat:
        pieces, problem = pieces_of(values, reading.chat)
        return Conversation(pieces), problem
    if all(value is None for value in values):
        values = [""]
    texts = ["" if value is None else value for value in values]
    for name, text in zip(reading.fields, texts, strict=False):
        if not isinstance(text, str):
            return "", f"field {name!r} is no string"
    text = texts[0] if len(texts) == 1 else "\n\n".join(texts)
    return (Named(text, str(identity)) if reading.id_field else text), None


def in_utf8(values: list[Any], where: str, reading: Reading, bad: BadLines) -> list[Any] | None:
    """The values with bytes as text, and without surrogates (halves of a character that UTF-16 writes in
    two; they are no characters, and UTF-8 has none). None: it is not valid, and is counted as bad.

    Raises:
        UserError: it is not valid, and --invalid-utf8 says stop.
    """
    try:
        return [_decoded(value, "strict") for value in values]
    except UnicodeError as error:
        if not replaces(error, where, reading, bad):
            return None
    bad.replaced += 1
    return without_surrogates(values)


def without_surrogates(value: Any) -> Any:
    """The value with U+FFFD for each surrogate, and for bytes that are not UTF-8."""
    return _decoded(value, "replace")


def _decoded(value: Any, errors: str) -> Any:
    if isinstance(value, bytes):
        return value.decode(errors=errors)
    if isinstance(value, str):
        if errors == "strict":
            value.encode()  # raises an error
            return value
        return SURROGATE.sub("\ufffd", value)
    if isinstance(value, dict):
        return {_decoded(key, errors): _decoded(inner, errors) for key, inner in value.items()}
    if isinstance(value, list):
        return [_decoded(inner, errors) for inner in value]
    return value
