"""Files for --config."""

import tempfile
from pathlib import Path

import yaml

_FOLDER = tempfile.TemporaryDirectory(prefix="gossamer-settings-")


def config(**values: object) -> list[str]:
    """The option, with a file of these settings."""
    with tempfile.NamedTemporaryFile("w", dir=_FOLDER.name, suffix=".yaml", delete=False) as file:
        yaml.safe_dump(values, file)
    return ["--config", str(Path(file.name))]
