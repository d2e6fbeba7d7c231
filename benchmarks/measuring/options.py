"""Options of the benchmarks' command lines."""

import argparse
from pathlib import Path


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """With --json. The help is the script's docstring."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    return parser
