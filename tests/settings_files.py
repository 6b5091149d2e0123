"""Settings files for --config."""

import tempfile
from pathlib import Path

import yaml

_FOLDER = tempfile.TemporaryDirectory(prefix="gossamer-settings-")


def config(**values: object) -> list[str]:
    """Build the option --config with a file of the given settings."""
    with tempfile.NamedTemporaryFile("w", dir=_FOLDER.name, suffix=".yaml", delete=False) as file:
        yaml.safe_dump(values, file)
    return ["--config", str(Path(file.name))]
