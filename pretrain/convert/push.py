"""Uploads an exported folder to Hugging Face's hub."""

from pathlib import Path

from huggingface_hub import HfApi, get_token

# HTTPError belongs to the hub's HTTP client, httpx or httpx2 by version. Lost connections raise it too.
from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from megatron_ladder.errors import UserError


def check_repository(name: str) -> None:
    """Checks the name of a repository, before long work starts.

    Raises:
        UserError: `name` is not of the form USER/NAME.
    """
    try:
        validate_repo_id(name)
        owner, _ = name.split("/")
    except (HFValidationError, ValueError):
        owner = ""
    if not owner:
        raise UserError(f"--push {name}: give USER/NAME, or ORGANISATION/NAME")


def push_folder(folder: Path, name: str, *, private: bool) -> str:
    """Uploads a folder as a model, in one commit. The repository is made if it does not exist.

    Args:
        name: USER/NAME.
        private: whether a repository that is made is private; an existing one stays as it is.

    Returns:
        The web address of the commit.

    Raises:
        UserError: nobody is logged in, or the hub refuses, or it cannot be reached. The folder is kept.
    """
    again = f"{folder} is complete and stays; upload it later with `hf upload {name} {folder}`"
    if get_token() is None:
        raise UserError(
            f"--push {name}: not logged in to Hugging Face: run `hf auth login`, or set HF_TOKEN to a "
            f"token with write access. {again}"
        )
    api = HfApi()
    try:
        api.create_repo(name, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=name, folder_path=folder, commit_message="Export of megatron-ladder"
        )
    except (HTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        raise UserError(f"--push {name} failed: {reason[0]}. {again}") from error
    return str(commit.commit_url)
