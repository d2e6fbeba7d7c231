"""What the benchmarks' pictures share."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from pretrain.files import write_atomically
from pretrain.pictures import png_bytes


def plain(axes: Any) -> None:
    """A pale grid, and no frame above and to the right."""
    axes.grid(True, color="#e6e6e6")
    axes.spines[["top", "right"]].set_visible(False)


def save(path: Path, figure: Figure) -> None:
    """As a PNG. Makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, png_bytes(figure))
