"""Files of the input folders that are not read: how many, by the endings of their names."""

from dataclasses import dataclass, field
from typing import Any

SHOWN, KINDS = 10, 50


@dataclass
class LeftOut:
    """Counts files, and their bytes."""

    counts: dict[str, list[int]] = field(default_factory=dict)
    """By what they are called (`*.csv`): files and bytes."""

    def add(self, called: str, size: int, files: int = 1) -> None:
        count = self.counts.setdefault(called, [0, 0])
        count[0] += files
        count[1] += size

    def add_all(self, other: "LeftOut") -> None:
        for called, (files, size) in other.counts.items():
            self.add(called, size, files)

    def __bool__(self) -> bool:
        return bool(self.counts)

    def __str__(self) -> str:
        facts = self.facts()
        shown = ", ".join(f"{one['named']} ({one['files']:,})" for one in facts[:SHOWN])
        return shown + (f" and {len(facts) - SHOWN} other kinds" if len(facts) > SHOWN else "")

    def facts(self) -> list[dict[str, Any]]:
        """The commonest first; of many kinds, the rare ones together."""
        order = sorted(self.counts.items(), key=lambda item: (-item[1][0], item[0]))
        if rest := [count for _, count in order[KINDS:]]:
            order[KINDS:] = [("others", [sum(numbers) for numbers in zip(*rest, strict=True)])]
        return [{"named": called, "files": files, "bytes": size} for called, (files, size) in order]


def summary(facts: list[dict[str, Any]]) -> str:
    """A line for people, of what `LeftOut.facts` gave."""
    counts = LeftOut({one["named"]: [one["files"], one["bytes"]] for one in facts})
    files, size = (sum(one[key] for one in facts) for key in ("files", "bytes"))
    return (
        f"{files:,} files of the input folders not read ({size / 1e6:.1f} MB): {counts}; "
        "--include PATTERN takes files of any name as plain text, if they are no archives"
    )


def ending_of(name: str) -> str:
    """The pattern of files that end alike, to count them by."""
    stem, dot, ending = name.rpartition(".")
    if not dot or not stem or len(ending) > 10:
        return "without an ending"
    return f"*.{ending.lower()}"
