"""Where the texts of a Hugging Face folder's model end."""

from pathlib import Path
from typing import Any

from megatron_ladder.config import MOST_SIZE
from megatron_ladder.errors import UserError
from megatron_ladder.json_files import is_whole, read_json, short


def end_ids(folder: Path) -> tuple[int, ...]:
    """Every token that ends a text: those of config.json, then those of generation_config.json.

    A chat model names several: one ends a turn, another a document. The first one is the most general.

    Raises:
        UserError: a file cannot be read, or names something else than token ids.
    """
    found: list[int] = []
    for name in ("config.json", "generation_config.json"):
        found += _named(folder / name)
    return tuple(dict.fromkeys(found))


def several(value: Any) -> list[int]:
    """Of a field that may be null, an id, or a list of ids."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(is_whole(i, -1, MOST_SIZE) for i in ids):
        raise ValueError(f"eos_token_id is {short(value)}: a token id, or a list of them")
    return [i for i in ids if i >= 0]  # -1 stands for none in older folders


def one_or_several(ids: tuple[int, ...]) -> int | list[int] | None:
    """As configurations have it."""
    return list(ids) if len(ids) > 1 else ids[0] if ids else None


def _named(path: Path) -> list[int]:
    if not path.is_file():
        return []
    try:
        return several(read_json(path, "a configuration").get("eos_token_id"))
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
