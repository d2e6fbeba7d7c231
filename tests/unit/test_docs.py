"""Pages name what is there: links, anchors, paths of the tree; and the site shows what GitHub shows."""

from pathlib import Path

import pytest

from tests import pages

ROOT = Path(__file__).parents[2]
PAGES = [str(page.relative_to(ROOT)) for page in pages.pages(ROOT)]
PROGRAMS = sorted(
    file
    for folder in pages.FOLDERS
    for file in (ROOT / folder).rglob("*")
    if file.suffix in {".py", ".sh", ".toml", ".jinja", ".txt"} and file != Path(__file__)
)
# By scripts/docs_hook.py.
FROM_THE_ROOT = {"contributing.md", "changelog.md"}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    wrong = pages.broken_links(ROOT, ROOT / page)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("page", [page for page in PAGES if page != "CHANGELOG.md"])
def test_named_paths_exist(page: str) -> None:
    missing = pages.missing_paths(ROOT, (ROOT / page).read_text())
    assert not missing, "\n".join(missing)


def test_pages_that_programs_name_exist() -> None:
    missing = [
        f"{file.relative_to(ROOT)}: {name}"
        for file in [*PROGRAMS, ROOT / "pyproject.toml", ROOT / "mkdocs.yml"]
        for name in pages.missing_pages(ROOT, file.read_text())
    ]
    assert not missing, "\n".join(missing)


@pytest.mark.parametrize("page", PAGES)
def test_the_site_shows_what_github_shows(page: str) -> None:
    wrong = pages.shown_otherwise((ROOT / page).read_text())
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("page", [p for p in PAGES if p not in pages.GENERATED])
def test_tables_have_at_most_six_columns(page: str) -> None:
    assert pages.wide_tables((ROOT / page).read_text()) == []


def test_every_page_is_in_the_nav_once() -> None:
    listed = pages.nav((ROOT / "mkdocs.yml").read_text())
    there = [page.removeprefix("docs/") for page in PAGES if page.startswith("docs/")]
    assert sorted(listed) == sorted([*there, *FROM_THE_ROOT])


def test_anchors_are_those_of_the_site() -> None:
    slugs = pytest.importorskip("pymdownx.slugs")
    of_the_site = slugs.slugify(case="lower")
    for page in PAGES:
        for heading in pages.headings((ROOT / page).read_text()):
            plain = heading.replace("`", "").replace("**", "")
            assert pages.slug(heading) == of_the_site(plain, "-"), (page, heading)


# The checks themselves.


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in (
        "docs/guides/data.md",
        "docs/index.md",
        "pretrain/loop/train.py",
        "docs/pictures/a.svg",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(
            "# Data\n\n## From S3, by parts: `--workers`\n\n    # no heading\n"
        )
    (tmp_path / "README.md").write_text("# Read me\n")
    return tmp_path


@pytest.mark.parametrize(
    ("page", "text", "wrong"),
    [
        (
            "README.md",
            "[a](docs/guides/data.md), ![b](docs/pictures/a.svg) and [c](pretrain/loop)",
            0,
        ),
        ("README.md", "[over two\nlines](docs/guides/data.md#from-s3-by-parts---workers)", 0),
        (
            "README.md",
            "[a](https://example.org/nothing), [b](mailto:a@b), [c](#read-me)\n\n# Read me",
            0,
        ),
        ("README.md", "`[a](gone.md)`\n\n    [b](gone.md)\n\n```\n[c](gone.md)\n```", 0),
        ("README.md", "[a](docs/guides/gone.md)", 1),
        ("README.md", "![a](docs/pictures/gone.svg)", 1),
        ("README.md", "[`a`](docs/guides/gone.md) and [b][c]\n\n[c]: docs/gone.md", 2),
        ("README.md", "[a](docs/guides/data.md#from-s3)", 1),
        ("README.md", "[a](docs/guides/data.md#no-heading)", 1),
        ("README.md", "[a](#elsewhere)", 1),
        ("README.md", "[a](/docs/guides/data.md)", 1),
        ("README.md", '<img src="docs/pictures/gone.svg">', 1),
        ("docs/guides/data.md", "[a](../index.md#data), ![b](../pictures/a.svg)", 0),
        ("docs/guides/data.md", "[a](../../README.md)", 1),
        ("docs/guides/data.md", "[a](../guides)", 1),
        ("docs/index.md", "- a list\n\n    with [a](gone.md) in its item", 1),
    ],
)
def test_broken_links_are_found(tree: Path, page: str, text: str, wrong: int) -> None:
    (tree / page).write_text(text)
    assert len(pages.broken_links(tree, tree / page)) == wrong


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("`pretrain/loop/train.py`, `pretrain/loop/` and `pretrain/*/train.py`", []),
        ("`loop/train.py`, `train.py`, `pretrain_gpt.py`, `runs/ladder`, `RUN/slurm/1`", []),
        (
            "    python pretrain/loop/train.py --json runs/x.json\n    slurm/1/   a folder of a run",
            [],
        ),
        ("pretrain/gone.py without backticks", []),
        ("`pretrain/gone.py`", ["pretrain/gone.py"]),
        ("`python benchmarks/gone.py --json FILE`", ["benchmarks/gone.py"]),
        ("`pretrain/loop/gone*.py`", ["pretrain/loop/gone*.py"]),
        (
            "`step.py`, `pretrain/train.py`, `other/train.py`",
            ["pretrain/train.py", "step.py", "other/train.py"],
        ),
        ("    bash scripts/gone.sh", ["scripts/gone.sh"]),
    ],
)
def test_missing_paths_are_found(tree: Path, text: str, missing: list[str]) -> None:
    assert pages.missing_paths(tree, text) == missing


def test_missing_pages_are_found(tree: Path) -> None:
    there, gone = "docs" + "/guides/data.md", "docs" + "/guides/gone.md"
    assert pages.missing_pages(tree, f"# {there} says why") == []
    assert pages.missing_pages(tree, f'"see {there}#data, {gone} and {there}#gone"') == [
        gone,
        f"{there}#gone",
    ]


def test_wide_tables_are_found() -> None:
    def table(columns: int) -> str:
        return "\n".join("|" + cell * columns for cell in (" a |", "---:|", " b |"))

    assert pages.wide_tables(f"# Tables\n\n{table(6)}\n") == []
    assert pages.wide_tables(f"# Tables\n\n{table(6)}\n\n{table(7)}\n") == [8]
    assert pages.wide_tables(table(7).replace("\n|", "\n").removeprefix("|")) == [2]
    assert pages.wide_tables("```\n" + table(7) + "\n```") == []


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("A list:\n\n- a\n  and more\n- b\n\n    - c\n\n| a |\n|---|", 0),
        ("# Heading\n- a\n1. b", 0),
        ("a sentence that ends with\n2. Another one", 0),
        ("a - b\n- c", 1),
        ("A table:\n| a |\n|---|", 1),
        ("- a\n  - b", 1),
        (r"such as \<name> here, and `\<name>`", 1),
        ("    code\n    - code", 0),
        ("```\ncode\n- code\n```\n- a", 0),
    ],
)
def test_what_the_site_shows_otherwise_is_found(text: str, wrong: int) -> None:
    assert len(pages.shown_otherwise(text)) == wrong


def test_slugs_are_githubs() -> None:
    assert pages.slug("What an H100 showed") == "what-an-h100-showed"
    assert pages.slug("`--ladder-layers`: last, *auto*") == "--ladder-layers-last-auto"
    assert pages.slug("See [Data & more](data.md)") == "see-data--more"


def test_the_nav_is_read_whole() -> None:
    text = (
        "nav:\n  - Home: index.md\n  - G:\n      - a.md\n      - B: b.md\nx: !!python/name:a.b {}\n"
    )
    assert pages.nav(text) == ["index.md", "a.md", "b.md"]
