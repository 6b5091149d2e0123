"""Configurations for ``accelerate launch``, which trains one model in several processes."""

from pathlib import Path

from gossamer.errors import GossamerError


def launch_file(name: str) -> Path:
    """Get a configuration file by name.

    Raises:
        GossamerError: if it does not exist.
    """
    files = {path.stem: path for path in sorted(Path(__file__).parent.glob("*.yaml"))}
    if name not in files:
        raise GossamerError(f"no launch file {name!r}; there are {', '.join(files)}")
    return files[name]
