"""How documents are read; and the lines that cannot be used."""

from dataclasses import dataclass, field
from typing import Any, Literal

from data_prep.errors import UserError
from data_prep.read.chat import Chat

TextDocuments = Literal["file", "paragraph", "line"]
InvalidUtf8 = Literal["skip", "replace", "stop"]
EXAMPLES = 5
NOT_UTF8 = "not UTF-8:"


def printable(name: str) -> str:
    """A file's name that UTF-8 can write: bytes in it that are not UTF-8 become \\udce9 and the like."""
    return name.encode("utf-8", "backslashreplace").decode()


@dataclass(frozen=True)
class Reading:
    """How documents are read out of files."""

    text_field: tuple[str, ...] = ("text",)
    """The key of the text in a JSON line or a row, or a path to it (`meta.text`). Several texts are
    joined by an empty line."""
    text_documents: TextDocuments = "file"
    """What a document is in a plain text file."""
    invalid_utf8: InvalidUtf8 = "skip"
    max_document_bytes: int = 16 << 20
    """A longer line, or text file that is one document, cannot be used: it would take too much
    memory."""
    chat: Chat | None = None
    """Documents are conversations, made of these fields; `text_field` is not used."""
    id_field: str | None = None
    """The key of a document's id: documents are then `Named`. Plain text has no ids."""

    @property
    def fields(self) -> tuple[str, ...]:
        return self.chat.fields if self.chat else self.text_field

    @property
    def columns(self) -> tuple[str, ...]:
        return (*self.fields, self.id_field) if self.id_field else self.fields

    def option_of(self, column: str) -> str:
        """The option that names the column."""
        if column == self.id_field:
            return "--id-field"
        if self.chat is None:
            return "--text-field"
        if self.chat.template is not None:
            return "--chat-field"
        if column == self.chat.fields[-1]:
            return "--answer-field"
        return "--text-field" if self.chat.prompt is None else "in --prompt-template another"


@dataclass
class BadLines:
    """Lines, or whole text files, that are skipped: how many, and the first few to show."""

    limit: int
    count: int = 0
    examples: list[str] = field(default_factory=list)
    replaced: int = 0
    """Documents in which invalid UTF-8 was replaced."""

    def add(self, where: str, why: str) -> None:
        """Raises UserError when there are more than `limit`."""
        self.count += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(printable(f"{where}: {why:.500}"))  # `why` may quote a document
        self.check()

    def add_part(self, facts: dict[str, Any]) -> None:
        """Adds what was counted of a part: its `count` and `examples`. Raises UserError as `add` does."""
        self.count += facts["count"]
        self.examples = (self.examples + facts["examples"])[:EXAMPLES]
        self.check()

    def check(self) -> None:
        if self.count > self.limit:
            shown = "\n".join(f"  {example}" for example in self.examples)
            replace = any(NOT_UTF8 in example for example in self.examples)
            hint = (
                "\n  (--invalid-utf8 replace puts U+FFFD for what is not UTF-8)" if replace else ""
            )
            raise TooManyBadLines(
                f"more than --max-bad-lines {self.limit} lines cannot be used; the first ones:\n"
                f"{shown}{hint}"
            )


class TooManyBadLines(UserError):
    """This ends the whole work: it would not help to go on with other files."""


class NoTextField(UserError):
    """No line has the text field: it has a wrong name, and this ends the whole work too."""


def replaces(error: UnicodeError, where: str, reading: Reading, bad: BadLines) -> bool:
    """Whether text that is not UTF-8 is to be replaced; else it is counted as bad.

    Raises:
        UserError: --invalid-utf8 stop.
    """
    assert isinstance(error, UnicodeDecodeError | UnicodeEncodeError)
    if isinstance(error, UnicodeDecodeError):
        why = f"{NOT_UTF8} {error.reason} at byte {error.start}"
    else:
        half = ord(error.object[error.start])
        why = f"{NOT_UTF8} U+{half:04X} at character {error.start} is half of a character"
    if reading.invalid_utf8 == "stop":
        raise UserError(f"{where}: {why}: give --invalid-utf8 replace or skip to go on") from error
    if reading.invalid_utf8 == "skip":
        bad.add(where, why)
    return reading.invalid_utf8 == "replace"
