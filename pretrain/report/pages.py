"""What all HTML pages share: one style, pictures inside the page, labels that tell runs or models apart."""

import base64
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined


def render(template: str, **values: Any) -> str:
    """The text of an HTML page that needs no other file.

    Args:
        template: the template's path, from `pretrain/`; it extends report/page.html.jinja. In it, the
            filter `base64` turns a picture's bytes into text.
        values: the template's variables.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parents[1]),
        autoescape=True,
        undefined=StrictUndefined,
    )
    environment.filters["base64"] = lambda png: base64.b64encode(png).decode()
    return environment.get_template(template).render(**values)


def labels(paths: list[Path]) -> list[str]:
    """A label for each folder: its name, with as many parents as it takes to make the labels differ."""
    for parts in range(1, max(len(p.absolute().parts) for p in paths) + 1):
        found = ["/".join(p.absolute().parts[-parts:]) for p in paths]
        if len(set(found)) == len(found):
            return found
    return [f"{label} ({i})" for i, label in enumerate(found, start=1)]
