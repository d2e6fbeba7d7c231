"""What the HTML pages share: one style, pictures inside, names that tell models apart."""

import base64
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined


def render(template: str, **values: Any) -> str:
    """A page that needs nothing else.

    Args:
        template: its path from `pretrain/`; it extends report/page.html.jinja. The filter `base64` makes
            text of a picture's bytes.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parents[1]),
        autoescape=True,
        undefined=StrictUndefined,
    )
    environment.filters["base64"] = lambda png: base64.b64encode(png).decode()
    return environment.get_template(template).render(**values)


def labels(paths: list[Path]) -> list[str]:
    """Folder names, with as many parents as it takes to tell them apart."""
    for parts in range(1, max(len(p.absolute().parts) for p in paths) + 1):
        found = ["/".join(p.absolute().parts[-parts:]) for p in paths]
        if len(set(found)) == len(found):
            return found
    return [f"{label} ({i})" for i, label in enumerate(found, start=1)]
