"""Settings as fields of dataclasses: each says what it means and which values it takes, once for all who ask."""

from collections.abc import Callable
from dataclasses import MISSING, field, fields
from typing import Any, TypeVar

_T = TypeVar("_T")


def setting(
    help: str,
    default: Any = MISSING,
    *,
    least: float | None = None,
    most: float | None = None,
    default_factory: Callable[[], Any] | Any = MISSING,
    **facts: Any,
) -> Any:
    """A field that a user can set.

    Args:
        help: what it means, in a sentence.
        default: its value if nothing is said; there is none if left out.
        least, most: the smallest and the largest number that it takes.
        default_factory: makes the default, where that is an object of its own.
        facts: whatever else its reader needs to know, for the field's metadata.
    """
    known = {"help": help, "least": least, "most": most, **facts}
    return field(default=default, default_factory=default_factory, metadata=known)


def documented(kind: type[_T]) -> type[_T]:
    """The dataclass with the help of its fields in its docstring."""
    lines = [f"    {one.name}: {one.metadata['help']}" for one in fields(kind) if "help" in one.metadata]  # type: ignore[arg-type]
    kind.__doc__ = "\n".join([(kind.__doc__ or "").rstrip(), "", "Attributes:", *lines])
    return kind
