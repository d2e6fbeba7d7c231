"""JSON that is not one value a line: an array of objects, or objects printed over several lines.

Its values are cut out as bytes, and read as lines are. So what is wrong with one of them, such as
invalid UTF-8, is treated as in a line, and a file may be larger than memory.
"""

import codecs
import re
from typing import Literal

from data_prep.errors import UserError
from data_prep.read.sources import Source

Shape = Literal["lines", "array", "objects"]
HEAD_BYTES = 4096
# In a string: everything up to its end, or up to a backslash that is the last byte.
INSIDE = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)
OUTSIDE = re.compile(rb'["\[\]{},]')


def shape_of(head: bytes) -> Shape:
    """How the JSON file is written that begins with these bytes.

    Lines begin with an object that ends in the line. A printed object has its first key, or its end, on
    its second line; so a line `{` that was cut short is taken for a bad line.
    """
    head = head[:HEAD_BYTES].removeprefix(codecs.BOM_UTF8).lstrip()
    if head.startswith(b"["):
        return "array"
    return "objects" if re.match(rb'\{[ \t]*\r?\n\s*["}]', head) else "lines"


class JsonValues:
    """Cuts values out of chunks of bytes.

    Args:
        array: the elements of one array; else objects one after another.
        longest: a value of more bytes becomes None, and is not held in memory.
    """

    def __init__(self, *, array: bool, longest: int) -> None:
        self._array = array
        self._longest = longest
        self._depth = 0
        self._in_string = False
        self._value = bytearray()
        self._bytes = 0
        self._held = b""
        self.newlines = 0
        self.ended = False
        """The array has ended."""

    def feed(self, chunk: bytes) -> tuple[list[bytes | None], bytes]:
        """The values that end in the chunk; and what follows the array's end, if that is in it."""
        chunk, self._held = self._held + chunk, b""
        values: list[bytes | None] = []
        at = begin = 0
        while True:
            if self._in_string:
                found = INSIDE.match(chunk, at)
                assert found is not None  # it matches nothing, too
                at = found.end()
                if at == len(chunk):
                    break
                if chunk[at] == ord("\\"):  # what it stands for is in the next chunk
                    chunk, self._held = chunk[:at], chunk[at:]
                    break
                at += 1
                self._in_string = False
                continue
            found = OUTSIDE.search(chunk, at)
            if found is None:
                break
            at = found.end()
            mark = found[0]
            if mark == b'"':
                self._in_string = True
            elif mark in b"[{":
                self._depth += 1
                if self._depth == 1 and self._array:  # the array begins here
                    self._value, self._bytes, begin = bytearray(), 0, at
            elif mark in b"]}":
                self._depth -= 1
                if self._array and self._depth <= 0:
                    values += self._end(chunk[begin : at - 1])
                    self.newlines += chunk[:at].count(b"\n")
                    self.ended = True
                    return values, chunk[at:]
                if not self._array and self._depth <= 0:
                    self._depth = 0
                    values += self._end(chunk[begin:at])
                    begin = at
            elif self._array and self._depth == 1:
                values += self._end(chunk[begin : at - 1])
                begin = at
        self._add(chunk[begin:])
        self.newlines += chunk.count(b"\n")
        return values, b""

    def close(self, source: Source) -> list[bytes | None]:
        """What is left at the file's end, and is no value.

        Raises:
            UserError: a value or the array has no end.
        """
        if self._depth or self._in_string or (self._array and not self.ended):
            raise UserError(f"{source.path} is cut short: its JSON has no end")
        return self._end(b"")

    def _add(self, data: bytes) -> None:
        self._bytes += len(data)
        if self._bytes <= self._longest:
            self._value += data
        else:
            self._value = bytearray()

    def _end(self, data: bytes) -> list[bytes | None]:
        """The value that ends with these bytes; none between two commas, or after the last."""
        self._add(data)
        value = bytes(self._value.strip()) if self._bytes <= self._longest else None
        self._value, self._bytes = bytearray(), 0
        return [] if value == b"" else [value]
