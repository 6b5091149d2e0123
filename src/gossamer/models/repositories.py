"""Repositories on the Hugging Face Hub: recognise those that gossamer wrote, and download their files.

Only JSON, text, tokenizer and safetensors files are downloaded, nothing that could run code, and only weights that
gossamer wrote.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from gossamer.errors import GossamerError
from gossamer.inputs import read_json

MODEL_TYPE = "gossamer"
"""``model_type`` in the ``config.json`` of a gated model, in place of the dense model's type."""

GATES = "gossamer_gates.safetensors"
"""File that distinguishes gossamer's adapters from others."""

FETCHED = (
    "*.json", "*.txt", "*.model", "*.jinja", "README.md",
    "gossamer*.safetensors", "adapter_model.safetensors",
)  # fmt: skip
"""Patterns of the files that are downloaded from a repository."""


def is_repository_id(name: str | os.PathLike[str]) -> bool:
    """Whether the name has the form of a Hub repository id and no local path of that name exists."""
    return isinstance(name, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not os.path.exists(name)


def found_folder(name: str | os.PathLike[str], revision: str | None = None) -> Path:
    """Return the directory of a gated model or of adapters; download it first if the name is a Hub repository id.

    Raises:
        GossamerError: if there is no such repository or revision, or the Hub cannot be reached and the repository is
            not in the local cache.
    """
    if not is_repository_id(name):
        return Path(name)
    with hub_faults(str(name), f"there is no directory {name} here, and no such repository on the Hub"):
        return Path(snapshot_download(str(name), revision=revision, allow_patterns=list(FETCHED)))


def gossamer_folder(name: str, revision: str | None = None) -> Path | None:
    """:func:`found_folder` for a Hub repository with a gated model or its adapters; None for any other name."""
    if not is_repository_id(name):
        return None
    if (config := _fetched(name, "config.json", revision)) is not None:
        outer: dict[str, Any] = read_json(config)
        ours = outer.get("model_type") == MODEL_TYPE
    else:
        ours = _fetched(name, GATES, revision) is not None
    return found_folder(name, revision) if ours else None


def _fetched(name: str, file: str, revision: str | None) -> Path | None:
    try:
        return Path(hf_hub_download(name, file, revision=revision))
    except (EntryNotFoundError, OfflineModeIsEnabled, OSError, ValueError):
        return None  # loading it as a dense model reports what is wrong


@contextmanager
def hub_faults(name: str, missing: str) -> Iterator[None]:
    """Turn errors of the Hub client into a one-line GossamerError; ``missing`` is the message for "not found"."""
    try:
        yield
    except GatedRepoError as error:
        raise GossamerError(f"{name} asks you to accept its terms on the Hub, and to log in: hf auth login") from error
    except RevisionNotFoundError as error:
        raise GossamerError(f"{name} has no such revision on the Hub") from error
    except RepositoryNotFoundError as error:
        raise GossamerError(missing) from error
    except HFValidationError as error:
        raise GossamerError(f"{name!r} is no id of a repository on the Hub; give one like org/name") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        reason = " ".join(str(error).split())
        raise GossamerError(f"{name} is no directory here, and the Hub cannot give it: {reason}") from error
