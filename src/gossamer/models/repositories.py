"""Repositories on the Hugging Face Hub: which of them are gossamer's, and what is fetched of them.

Only JSON, text and safetensors are fetched, nothing that could run code, and of weights only those that gossamer wrote.
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
"""What ``config.json`` of a model with gates says instead of the dense model's type."""

GATES = "gossamer_gates.safetensors"
"""The file that tells adapters of gossamer's from others."""

FETCHED = (
    "*.json", "*.txt", "*.model", "*.jinja", "README.md",
    "gossamer*.safetensors", "adapter_model.safetensors",
)  # fmt: skip
"""Files of a repository that are fetched."""


def is_repository_id(name: str | os.PathLike[str]) -> bool:
    """Whether a name could be that of a repository on the Hub, and is nothing on this machine."""
    return isinstance(name, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not os.path.exists(name)


def found_folder(name: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The directory of a model with gates, or of adapters; that of a repository on the Hub is fetched first.

    Raises:
        GossamerError: if there is no such repository or revision, or the Hub cannot be reached and it was not fetched
            before.
    """
    if not is_repository_id(name):
        return Path(name)
    with hub_faults(str(name), f"there is no directory {name} here, and no such repository on the Hub"):
        return Path(snapshot_download(str(name), revision=revision, allow_patterns=list(FETCHED)))


def gossamer_folder(name: str, revision: str | None = None) -> Path | None:
    """:func:`found_folder` of a repository that holds a model with gates or adapters of one; None of any other name."""
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
        return None  # whoever loads it as a dense model says what is wrong


@contextmanager
def hub_faults(name: str, missing: str) -> Iterator[None]:
    """Say in one line what went wrong with a repository; ``missing`` is what it means that the Hub does not find it."""
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
