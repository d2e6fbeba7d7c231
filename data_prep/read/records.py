"""The text of a record: a JSON object, or a row of a table."""

from typing import Any

from data_prep.read.chat import Conversation, pieces_of
from data_prep.read.reading import Reading


class Named(str):
    """A text with its document's id."""

    __slots__ = ("name",)
    name: str

    def __new__(cls, text: str, name: str) -> "Named":
        named = super().__new__(cls, text)
        named.name = name
        return named


def text_of(value: Any, reading: Reading) -> tuple[str, str | None]:
    """The text of a JSON object or a row, and None; or "", and why it has no text."""
    if not isinstance(value, dict):
        hint = " (a JSON array? one object a line is needed)" if isinstance(value, list) else ""
        return "", f"not a JSON object{hint}"
    found = []
    for name in reading.columns:
        inner: Any = value
        for key in (name,) if name in value else name.split("."):
            if not isinstance(inner, dict) or key not in inner:
                return "", f"no field {name!r}"
            inner = inner[key]
        found.append(inner)
    identity = found.pop() if reading.id_field else None
    if isinstance(identity, dict | list) or (reading.id_field and identity is None):
        return "", f"field {reading.id_field!r} is no string or number"
    if reading.chat:
        pieces, problem = pieces_of(found, reading.chat)
        return Conversation(pieces), problem
    for name, text in zip(reading.fields, found, strict=True):
        if not isinstance(text, str):
            return "", f"field {name!r} is no string"
    text = found[0] if len(found) == 1 else "\n\n".join(found)
    return (Named(text, str(identity)) if reading.id_field else text), None
