"""Reads pickles without running them: what Python would import and call is only named in the result.

A pickle is a program for a small stack machine. Python's own machine calls what the program names, and
hashes what it uses as keys, which can take for ever. This one knows the instructions that torch's
checkpoints use, makes plain values of them, and calls and hashes nothing.
"""

import struct
from dataclasses import dataclass
from typing import Any

from megatron_ladder.reading.plain_files import NotData


@dataclass(frozen=True, slots=True)
class Name:
    """A class or function that the pickle names, such as torch.Size."""

    name: str


@dataclass(slots=True)
class Call:
    """What Python would have called: the name and its arguments, and the state that it would have set."""

    name: str
    arguments: tuple[Any, ...]
    state: Any = None


@dataclass(frozen=True, slots=True)
class Stored:
    """A reference to data outside of the pickle: torch's storages."""

    reference: Any


class Pairs(list[tuple[Any, Any]]):
    """A dictionary, as its keys and values in the pickle's order. A key may be there twice."""


# torch and pickle write a batch of 1,000 items at a time.
_DEEPEST = 10_000
_WRONG = (IndexError, KeyError, TypeError, ValueError, OverflowError, struct.error)


def read_pickle(data: bytes, names: frozenset[str]) -> Any:
    """The value that a pickle describes.

    It takes time and memory in proportion to the pickle's size, and at most about 60 bytes for each byte.

    Args:
        names: what the pickle may name, with its module.

    Returns:
        None, bool, int of 8 bytes, float, str, bytes, tuple and list; `Pairs` for dictionaries; `Call` and
        `Name` for what is in `names`; `Stored`. A list may contain itself.

    Raises:
        NotData: it names something else, or is not a pickle such as torch writes.
    """
    try:
        return _read(data, names)
    except NotData:
        raise
    except _WRONG as error:
        raise NotData(f"is not a pickle as torch writes it ({type(error).__name__})") from error


def _read(data: bytes, names: frozenset[str]) -> Any:
    memo: dict[int, Any] = {}
    marks: list[int] = []
    stack: list[Any] = []
    push, pop = stack.append, stack.pop
    at, end = 0, len(data)
    while at < end:
        code = data[at]
        at += 1
        if code == 0x94:  # MEMOIZE
            memo[len(memo)] = stack[-1]
        elif code == 0x6A:  # LONG_BINGET
            push(memo[int.from_bytes(data[at : at + 4], "little")])
            at += 4
        elif code == 0x68:  # BINGET
            push(memo[data[at]])
            at += 1
        elif code == 0x4B:  # BININT1
            push(data[at])
            at += 1
        elif code == 0x28:  # MARK
            if len(stack) > _DEEPEST or len(marks) > _DEEPEST:
                raise NotData("is not a pickle as torch writes it (nested too deeply)")
            marks.append(len(stack))
        elif code == 0x81 or code == 0x52:  # NEWOBJ, REDUCE
            arguments, function = pop(), pop()
            if type(arguments) is not tuple or type(function) is not Name:
                raise TypeError
            is_dict = function.name == "collections.OrderedDict" and not arguments
            push(Pairs() if is_dict else Call(function.name, arguments))
        elif code == 0x62:  # BUILD
            state, built = pop(), stack[-1]
            if type(built) is not Call or built.state is not None:
                raise TypeError
            built.state = state
        elif code == 0x29:  # EMPTY_TUPLE
            push(())
        elif code == 0x7D:  # EMPTY_DICT
            push(Pairs())
        elif code == 0x75:  # SETITEMS
            begin = marks.pop()
            items = stack[begin:]
            del stack[begin:]
            _add(stack[-1], items)
        elif code == 0x85:  # TUPLE1
            stack[-1] = (stack[-1],)
        elif code == 0x86:  # TUPLE2
            stack[-2:] = [(stack[-2], stack[-1])]
        elif code == 0x87:  # TUPLE3
            stack[-3:] = [(stack[-3], stack[-2], stack[-1])]
        elif code == 0x4E:  # NONE
            push(None)
        elif code == 0x89:  # NEWFALSE
            push(False)
        elif code == 0x88:  # NEWTRUE
            push(True)
        elif code == 0x4D:  # BININT2
            push(int.from_bytes(_bytes(data, at, 2), "little"))
            at += 2
        elif code == 0x4A:  # BININT
            push(int.from_bytes(_bytes(data, at, 4), "little", signed=True))
            at += 4
        elif code == 0x8C:  # SHORT_BINUNICODE
            size = data[at]
            push(_bytes(data, at + 1, size).decode())
            at += 1 + size
        elif code == 0x58:  # BINUNICODE
            size = int.from_bytes(_bytes(data, at, 4), "little")
            push(_bytes(data, at + 4, size).decode())
            at += 4 + size
        elif code == 0x71:  # BINPUT
            memo[data[at]] = stack[-1]
            at += 1
        elif code == 0x72:  # LONG_BINPUT
            memo[int.from_bytes(_bytes(data, at, 4), "little")] = stack[-1]
            at += 4
        elif code == 0x74:  # TUPLE
            begin = marks.pop()
            stack[begin:] = [tuple(stack[begin:])]
        elif code == 0x5D:  # EMPTY_LIST
            push([])
        elif code == 0x61:  # APPEND
            item = pop()
            _extend(stack[-1], [item])
        elif code == 0x65:  # APPENDS
            begin = marks.pop()
            items = stack[begin:]
            del stack[begin:]
            _extend(stack[-1], items)
        elif code == 0x73:  # SETITEM
            value, key = pop(), pop()
            _add(stack[-1], [key, value])
        elif code == 0x93:  # STACK_GLOBAL
            name, module = pop(), pop()
            push(_named(module, name, names))
        elif code == 0x63:  # GLOBAL
            first = data.index(b"\n", at, at + 1000)
            second = data.index(b"\n", first + 1, first + 1000)
            push(_named(data[at:first].decode(), data[first + 1 : second].decode(), names))
            at = second + 1
        elif code == 0x51:  # BINPERSID
            push(Stored(pop()))
        elif code == 0x47:  # BINFLOAT
            push(struct.unpack(">d", _bytes(data, at, 8))[0])
            at += 8
        elif code == 0x8A:  # LONG1
            size = data[at]
            if size > 8:
                raise NotData("has an integer of more than 8 bytes")
            push(int.from_bytes(_bytes(data, at + 1, size), "little", signed=True))
            at += 1 + size
        elif code == 0x43:  # SHORT_BINBYTES
            size = data[at]
            push(_bytes(data, at + 1, size))
            at += 1 + size
        elif code == 0x42:  # BINBYTES
            size = int.from_bytes(_bytes(data, at, 4), "little")
            push(_bytes(data, at + 4, size))
            at += 4 + size
        elif code == 0x80:  # PROTO
            if data[at] not in (2, 3, 4, 5):
                raise NotData(f"is a pickle of protocol {data[at]}")
            at += 1
        elif code == 0x95:  # FRAME: where the next bytes end, which the instructions say as well
            at += 8
        elif code == 0x2E:  # STOP
            (value,) = stack
            return value
        else:
            raise NotData(f"has an instruction that no checkpoint needs ({code:#04x})")
        if len(stack) > 2 * _DEEPEST:
            raise NotData("is not a pickle as torch writes it (nested too deeply)")
    raise NotData("ends too early")


def _bytes(data: bytes, at: int, size: int) -> bytes:
    found = data[at : at + size]
    if len(found) != size:
        raise NotData("ends too early")
    return found


def _named(module: Any, name: Any, names: frozenset[str]) -> Name:
    if type(module) is not str or type(name) is not str:
        raise TypeError
    if (whole := f"{module}.{name}") not in names:
        raise NotData(
            f"names {whole[:100]!r}, which no checkpoint needs. Loading it could run code"
        )
    return Name(whole)


def _extend(target: Any, items: list[Any]) -> None:
    if type(target) is not list:
        raise TypeError
    target.extend(items)


def _add(target: Any, items: list[Any]) -> None:
    if type(target) is not Pairs or len(items) % 2:
        raise TypeError
    target.extend(zip(items[::2], items[1::2], strict=True))
