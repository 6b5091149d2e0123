"""Configurations for ``accelerate launch``: how several processes share the training of one model."""

from pathlib import Path

from gossamer.errors import GossamerError


def launch_file(name: str) -> Path:
    """The configuration of that name.

    Raises:
        GossamerError: if there is none.
    """
    files = {path.stem: path for path in sorted(Path(__file__).parent.glob("*.yaml"))}
    if name not in files:
        raise GossamerError(f"no launch file {name!r}; there are {', '.join(files)}")
    return files[name]
