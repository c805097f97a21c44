"""Puts an exported adapter onto the hub."""

from __future__ import annotations

import re
from pathlib import Path

from editcore import HParamsError, ModelError

__all__ = ["check_repository", "push"]

_OF_THIS_MACHINE = ["edits/*", "base.json"]
"""Files that name folders of the machine that made them; only 'editctl import' reads them."""


def check_repository(name: str) -> None:
    """Refuse what is no name of a repository.

    Raises:
        HParamsError: it is not.
    """
    if re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", name) is None:
        raise HParamsError(f"--push-to-hub takes the name of a repository, such as user/name; found '{name}'.")


def push(folder: Path, repository: str, *, public: bool = False) -> str:
    """Put the adapter in a folder into a repository, which is made if it does not exist. Gives its address.

    The single edits stay here, because their records name folders of this machine.

    Args:
        public: whether a new repository is for everybody to see; one that exists stays as it is.

    Raises:
        ModelError: the hub cannot be reached, or refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError, of the library that it uses
        HFValidationError,
        HTTPError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
    )

    api = HfApi()
    try:
        made = api.create_repo(repository, private=not public, exist_ok=True)
        api.upload_folder(
            repo_id=made.repo_id,
            folder_path=folder,
            ignore_patterns=_OF_THIS_MACHINE,
            commit_message="Adapter written by editcore",
        )
    except LocalTokenNotFoundError as error:
        raise ModelError("The hub does not know who you are. Log in: hf auth login") from error
    except OfflineModeIsEnabled as error:
        raise ModelError(f"{folder} is written, but HF_HUB_OFFLINE is set, so the hub is not asked.") from error
    except (HTTPError, HFValidationError, OSError) as error:
        said = " ".join(str(error).split())
        raise ModelError(f"{folder} is written, but the hub did not take it: {said}") from error
    return str(made)
