"""What the files of a tree import of each other, read without running them."""

import ast
from collections.abc import Iterable
from pathlib import Path

Graph = dict[str, set[str]]
"""By module, the modules of the same tree that it imports."""


def import_graph(root: Path, packages: Iterable[str]) -> Graph:
    """Imports between the modules of packages: at the top, in functions, and for type checkers."""
    files = {_module(f, root): f for package in packages for f in (root / package).rglob("*.py")}
    return {module: _imports(module, file, set(files)) for module, file in sorted(files.items())}


def _module(file: Path, root: Path) -> str:
    return ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def _imports(module: str, file: Path, known: set[str]) -> set[str]:
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    named: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: package.count(".") + 2 - node.level] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            # `from package import name` may name a module.
            named |= {source, *(f"{source}.{alias.name}" for alias in node.names)}
    return (named & known) - {module}


def circles(graph: Graph) -> list[list[str]]:
    """Groups of modules of which each imports, over others, every other one."""

    def reached_from(start: str) -> set[str]:
        found, waiting = set(), [start]
        while waiting:
            for module in graph[waiting.pop()] - found:
                found.add(module)
                waiting.append(module)
        return found

    reached = {module: reached_from(module) for module in graph}
    groups = {
        tuple(sorted(m for m in reached[start] if start in reached[m]))
        for start in graph
        if start in reached[start]
    }
    return sorted(map(list, groups))
