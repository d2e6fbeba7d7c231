"""What a page of Markdown links to and names, so that tests can ask whether it is there.

Pages are read on GitHub and on the site (mkdocs.yml): what only one of them shows well is found, too.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import yaml

FOLDERS = (
    "megatron_ladder",
    "pretrain",
    "data_prep",
    "slurm",
    "benchmarks",
    "docs",
    "scripts",
    "tests",
)
"""Folders of the tree whose paths, named in a page, must exist."""
GENERATED = {"docs/reference/command-line.md", "docs/reference/configuration.md"}
"""Their tables may be wide."""
FOREIGN = {"pretrain_gpt.py", "preprocess_data.py"}
"""Python files of other projects that pages name."""
MAX_COLUMNS = 6

_ITEM = re.compile(r"^( *)(?:[-*+]|\d+\.) +\S")
# Of numbers only 1 starts a list in a paragraph, on GitHub.
_FIRST_ITEM = re.compile(r"^( *)(?:[-*+]|1\.) +\S")
_SEPARATOR = re.compile(r"^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$")
_PATH = re.compile(rf"(?<![\w./-])(?:{'|'.join(FOLDERS)})/[\w./*-]*")
_PAGE_NAMED = re.compile(r"(?<![\w./-])docs/[\w./-]+\.md(?:#[\w-]+)?")


def pages(root: Path) -> list[Path]:
    """Every page of the project."""
    named = [root / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    return [*named, *sorted(root.glob("*/README.md")), *sorted((root / "docs").rglob("*.md"))]


def lines_of(text: str) -> Iterator[tuple[int, str, bool]]:
    """Number, line and whether it is code, by fences or by indentation."""
    fence, is_in_list, was_blank, is_in_code = "", False, True, False
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.strip()
        if fence:
            yield number, line, True
            if stripped.startswith(fence) and not stripped.strip(fence[0]):
                fence = ""
            continue
        if opened := re.match(r"```+|~~~+", stripped):
            fence = opened.group()
            yield number, line, True
            continue
        indented = line.startswith("    ")
        if stripped and not indented:
            starts = _ITEM.match(line) is not None
            is_in_list = starts or (is_in_list and (line.startswith(" ") or not was_blank))
        is_in_code = bool(stripped) and indented and not is_in_list and (was_blank or is_in_code)
        yield number, line, is_in_code
        was_blank = not stripped


def prose(text: str) -> str:
    """Without its blocks of code; lines keep their numbers."""
    return "\n".join("" if is_code else line for _, line, is_code in lines_of(text))


def slug(heading: str) -> str:
    """The anchor that GitHub makes, and the site's `toc` (mkdocs.yml)."""
    heading = re.sub(r"!?\[([^]]*)\]\([^)]*\)", r"\1", heading)
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def headings(text: str) -> list[str]:
    return re.findall(r"^#{1,6} +(.+?)(?: +#+)? *$", prose(text), re.M)


def anchors(text: str) -> set[str]:
    """Of its headings, and of what mkdocstrings puts in."""
    return {slug(heading) for heading in headings(text)} | set(
        re.findall(r"^::: (\S+)", text, re.M)
    )


def links(text: str) -> list[str]:
    """Targets of links and images, code left out."""
    text = re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", "", prose(text), flags=re.S)
    inline = re.findall(r"\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)", text)
    defined = re.findall(r"^\[[^]]+\]:\s*(\S+)", text, re.M)
    return inline + defined + re.findall(r"\b(?:src|href)=\"([^\"]+)\"", text)


def broken_links(root: Path, page: Path) -> list[str]:
    """Relative links of a page that lead nowhere; from docs/ also those that lead out of it."""
    wrong = []
    for link in links(page.read_text(encoding="utf-8")):
        if re.match(r"[a-z][a-z+.-]*:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        docs = (root / "docs").resolve()
        if path.startswith("/") or not target.exists():
            wrong.append(f"{link}: is not there")
        elif page.resolve().is_relative_to(docs) and not target.is_relative_to(docs):
            wrong.append(
                f"{link}: outside docs/, where the site has no page: name it in `backticks`"
            )
        elif page.resolve().is_relative_to(docs) and target.is_dir():
            wrong.append(f"{link}: a folder, which is no page of the site")
        elif anchor and anchor not in anchors(target.read_text(encoding="utf-8")):
            wrong.append(f"{link}: no such heading")
    return wrong


def missing_paths(root: Path, text: str) -> list[str]:
    """Paths of the tree that `code` or a block of code names, and that are not there."""
    in_blocks = "\n".join(line for _, line, is_code in lines_of(text) if is_code)
    spans = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose(text))
    named = [path for span in spans for path in _PATH.findall(span)]
    named += [p for p in _PATH.findall(in_blocks) if re.search(r"\.(py|sh|md|toml|svg|png)$", p)]
    files = [span for span in spans if re.fullmatch(r"[\w/]+\.py", span) and not _PATH.match(span)]
    missing = [path for path in dict.fromkeys(named) if not _exists(root, path.rstrip("./"))]
    for file in dict.fromkeys(files):
        tails = (found for folder in FOLDERS for found in (root / folder).rglob(Path(file).name))
        if file not in FOREIGN and not any(f"/{tail}".endswith(f"/{file}") for tail in tails):
            missing.append(file)
    return missing


def _exists(root: Path, path: str) -> bool:
    return any(root.glob(path)) if "*" in path else (root / path).exists()


def missing_pages(root: Path, text: str) -> list[str]:
    """Pages of docs/ that a program's text names, and that are not there, or have no such heading."""
    missing = []
    for name in dict.fromkeys(_PAGE_NAMED.findall(text)):
        path, _, anchor = name.partition("#")
        page = root / path
        if not page.is_file() or (anchor and anchor not in anchors(page.read_text("utf-8"))):
            missing.append(name)
    return missing


def wide_tables(text: str) -> list[int]:
    """Lines of the tables with more than MAX_COLUMNS columns."""
    return [
        number
        for number, line, is_code in lines_of(text)
        if not is_code
        and _SEPARATOR.match(line)
        and line.strip().strip("|").count("|") >= MAX_COLUMNS
    ]


def shown_otherwise(text: str) -> list[str]:
    """Lists and tables that GitHub shows and the site does not."""
    wrong, before, is_in_block = [], "", False
    for number, line, is_code in lines_of(text):
        item = _ITEM.match(line)
        is_row = line.startswith("|")
        if is_code:
            before, is_in_block = "", False
            continue
        if r"\<" in re.sub(r"`[^`]*`", "", line):
            wrong.append(f"line {number}: \\< begins an HTML tag on the site: write &lt;")
        if item and len(item.group(1)) % 4:
            wrong.append(f"line {number}: a list in a list is indented by 4")
        elif (_FIRST_ITEM.match(line) or is_row) and before and not is_in_block:
            wrong.append(
                f"line {number}: an empty line is needed before a {'list' if item else 'table'}"
            )
        if not line.strip() or line.startswith("#"):
            before, is_in_block = "", False
        else:
            before, is_in_block = line, is_in_block or bool(item) or is_row
    return wrong


class _Yaml(yaml.SafeLoader):
    """Passes over mkdocs.yml's names of Python objects."""


_Yaml.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)


def nav(text: str) -> list[str]:
    """The pages in mkdocs.yml's nav, in order."""

    def flat(entry: object) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        elif isinstance(entry, dict):
            for value in entry.values():
                yield from flat(value)
        elif isinstance(entry, list):
            for value in entry:
                yield from flat(value)

    return list(flat(yaml.load(text, _Yaml)["nav"]))  # noqa: S506 (a SafeLoader)
