"""Settings files: YAML with a flat mapping from name to value."""

import json
from collections.abc import Mapping
from dataclasses import MISSING
from pathlib import Path
from textwrap import wrap
from typing import Any

import yaml

from gossamer.errors import GossamerError
from gossamer.fields import Setting
from gossamer.inputs import read_text, reason
from gossamer.runs.settings import SettingsSource, settings


class _Loader(yaml.SafeLoader):
    """A YAML loader that rejects duplicate keys."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if (name := self.construct_object(key)) in seen:
                raise yaml.MarkedYAMLError(problem=f"{name} stands twice", problem_mark=key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


def read_settings(file: Path) -> SettingsSource:
    """Read the settings in a file.

    Raises:
        GossamerError: if the file cannot be read or does not contain settings.
    """
    text = read_text(file, "give a file as gossamer settings prints")
    try:
        found = yaml.load(text, _Loader)
    except Exception as error:  # invalid numbers, dates and keys raise exceptions of several types
        raise GossamerError(f"{file} is not YAML: {reason(error)}") from error
    if found is None:
        found = {}
    if not isinstance(found, dict):
        raise GossamerError(f"{file} holds no settings; give lines like 'tokens: 1000000', as gossamer settings prints")
    return SettingsSource(found, str(file))


def all_settings(values: Mapping[str, Any] | None = None) -> str:
    """Write the text of a settings file with every setting, each below its help.

    Settings without a value, and those of constraints other than the chosen one, are commented out.

    Args:
        values: values of some settings, such as those of a preset; all others have their defaults.
    """
    known, given = settings(), values or {}
    kind = given.get("constraint", known["constraint"].default)
    parts = [_entry(one, kind, given.get(one.name, one.default)) for one in known.values() if not one.recorded]
    return "\n\n".join(parts) + "\n"


def _entry(one: Setting, kind: str, value: Any) -> str:
    help = one.help
    if one.kinds:
        help += f" Of the constraint {' and '.join(one.kinds)}."
    help += f" {one.wanted[0].upper()}{one.wanted[1:]}."
    lines = [f"# {line}" for line in wrap(help, 110, break_long_words=False, break_on_hyphens=False)]
    if value is MISSING:
        return "\n".join([*lines, f"# {one.name}:"])
    value = list(value) if isinstance(value, tuple) else value
    written = value if isinstance(value, str) else _yaml_number(value)
    other = bool(one.kinds) and kind not in one.kinds
    return "\n".join([*lines, f"{'# ' if other else ''}{one.name}: {written}"])


def _yaml_number(value: Any) -> str:
    """Write a value so that YAML reads it back: 1.0e-04, since YAML reads 1e-04 as a string."""
    text = json.dumps(value)
    return text.replace("e", ".0e", 1) if isinstance(value, float) and "e" in text and "." not in text else text
