"""Settings of ``gossamer sparsify`` by name, one YAML file each.

summary    in a few words
tried      whether a run with these settings stands in docs/runs.md; else they are carried over from one that does
settings   as a settings file has them; what is not said has its default
config     the model's configuration for transformers, without its weights, so that ``gossamer plan`` needs no network
"""

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from gossamer.errors import GossamerError


@dataclass(frozen=True)
class Preset:
    """One preset; the fields are those of its file, ``name`` that of the file."""

    name: str
    summary: str
    tried: bool
    settings: dict[str, Any]
    config: dict[str, Any]


@cache
def presets() -> dict[str, Preset]:
    """All presets by name."""
    found = {}
    for file in sorted(files(__name__).iterdir(), key=lambda file: file.name):
        if file.name.endswith(".yaml"):
            name = file.name.removesuffix(".yaml")
            found[name] = Preset(name, **yaml.safe_load(file.read_text(encoding="utf-8")))
    return found


def find_preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        GossamerError: if there is none.
    """
    if name not in presets():
        raise GossamerError(f"no preset {name!r}; there are {', '.join(presets())}")
    return presets()[name]
