"""Wrong copies of right files: values of JSON that no program wrote, and bytes that were changed."""

import copy
import json
import random
from typing import Any

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 7, 255, 1 << 31, (1 << 31) - 1, 1 << 40, 1 << 63, -(1 << 63)),
    *(10**12, 10**30, -(10**30), 0.5, 2.0, -0.0, 1e308, 5e-324, float("nan"), float("inf")),
    *(
        "",
        "x",
        "0",
        "12",
        "..",
        "../../config.json",
        "/etc/passwd",
        "a/b",
        "a\0b",
        "\ud800",
        "\x1b[2J",
    ),
    *(
        "nan",
        "é",
        "\u2028",
        "x" * 5000,
        "sentencepiece",
        "tokenizer.json",
        "train",
        "llama",
        "float32",
    ),
    *([], {}, [[]], [{}], {"": 0}, [None], [0, 1], ["x"], {"a": {"a": {"a": []}}}, [1] * 1000),
)


def nested(levels: int) -> Any:
    value: Any = 0
    for number in range(levels):
        value = [value] if number % 2 else {"a": value}
    return value


def odd_json(rng: random.Random, right: Any) -> bytes:
    """A text of JSON: a changed copy of `right`, perhaps in another encoding, damaged or cut."""
    value = copy.deepcopy(right)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        value = _changed(rng, value)
    text = json.dumps(value)
    chance = rng.random()
    if chance < 0.85:
        return text.encode()
    if chance < 0.88:
        return text.encode("utf-16")
    if chance < 0.90:
        return b"\xef\xbb\xbf" + text.encode()
    if chance < 0.92:
        return json.dumps(value, ensure_ascii=False).encode(errors="surrogatepass")
    if chance < 0.94:
        return rng.choice((b"[", b'{"a":')) * rng.choice((50, 500, 5000, 100_000)) + text.encode()
    if chance < 0.96:
        return text.encode().replace(b"1", b"1" * rng.choice((30, 400, 5000)), 1)
    return odd_bytes(rng, text.encode())


def _changed(rng: random.Random, value: Any) -> Any:
    """`value`, with one change at a random place in it, if it has places; else another value."""
    places: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        inner = waiting.pop()
        if isinstance(inner, dict | list):
            keys = list(inner) if isinstance(inner, dict) else range(len(inner))
            places += [(inner, key) for key in keys]
            waiting += [inner[key] for key in keys]
    if not places:
        return copy.deepcopy(rng.choice(ODD))
    holder, key = rng.choice(places)
    chance = rng.random()
    old = holder[key]
    if chance < 0.6:
        holder[key] = copy.deepcopy(rng.choice(ODD))
    elif chance < 0.7:
        del holder[key]
    elif chance < 0.8 and type(old) in (int, float):
        holder[key] = rng.choice((old + 1, old - 1, -old, old * 1000, str(old), [old], float(old)))
    elif chance < 0.85:
        holder[key] = nested(rng.choice((10, 99, 101, 150)))
    elif chance < 0.93 and isinstance(holder, dict):
        holder[rng.choice(("x", "", "../x", "a\0", "\ud800", "\x1b[2J", "y" * 300))] = old
    else:
        other, place = rng.choice(places)
        holder[key] = copy.deepcopy(other.get(place) if isinstance(other, dict) else old)
    return value


def odd_bytes(rng: random.Random, right: bytes) -> bytes:
    """Changed bits and bytes and whole numbers, cuts, repetitions, insertions."""
    data = bytearray(right)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(7):
            case 0 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case 1 if at < len(data):
                data[at] = rng.choice((0, 1, 127, 128, 255, 34, 92, 91, 123))
            case 2:
                del data[at : at + rng.choice((1, 4, 8, 100))]
            case 3:
                data[at:at] = data[at : at + rng.choice((1, 4, 8, 100))]
            case 4:
                data[at:at] = rng.randbytes(rng.choice((1, 2, 8)))
            case 5:
                number = rng.choice((0, 1, -1, 1 << 31, 1 << 40, (1 << 63) - 1, -(1 << 63)))
                data[at : at + 8] = (number % (1 << 64)).to_bytes(8, "little")
            case _:
                del data[at:]
                if not data:
                    return b""
    return bytes(data)
