"""Settings as dataclass fields: each defines its meaning and accepted values in one place."""

import math
import types
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

_T = TypeVar("_T")

LARGEST_SEED = 2**32 - 1
"""The largest seed that all libraries used here accept."""


def setting(
    help: str,
    default: Any = MISSING,
    *,
    least: float | None = None,
    most: float | None = None,
    default_factory: Callable[[], Any] | Any = MISSING,
    **facts: Any,
) -> Any:
    """Make a dataclass field that users can set.

    Args:
        help: its meaning, in one sentence.
        default: the default value; without it, the field has none.
        least, most: the smallest and the largest accepted number.
        default_factory: creates the default where every instance needs a new object.
        facts: further entries for the field's metadata.
    """
    known = {"help": help, "least": least, "most": most, **facts}
    return field(default=default, default_factory=default_factory, metadata=known)


def documented(kind: type[_T]) -> type[_T]:
    """Add the help of its fields to a dataclass's docstring."""
    lines = [f"    {one.name}: {one.metadata['help']}" for one in fields(kind) if "help" in one.metadata]  # type: ignore[arg-type]
    kind.__doc__ = "\n".join([(kind.__doc__ or "").rstrip(), "", "Attributes:", *lines])
    return kind


@dataclass(frozen=True)
class Setting:
    """A field as users see it.

    Attributes:
        name: as written in files; the command line uses dashes.
        type: of its value.
        help: its meaning.
        default: the default value; ``MISSING`` if the setting is required.
        least, most: the smallest and the largest accepted number.
        kinds: names of the constraints that have this setting; empty if every run has it.
        recorded: whether it is only recorded and cannot be set.
    """

    name: str
    type: Any
    help: str
    default: Any = MISSING
    least: float | None = None
    most: float | None = None
    kinds: tuple[str, ...] = ()
    recorded: bool = False

    @classmethod
    def of(cls, one: Field[Any], type: Any, *, prefix: str = "", kinds: tuple[str, ...] = ()) -> "Setting":
        """Make the setting of a field that :func:`setting` made."""
        facts = {key: one.metadata[key] for key in ("help", "least", "most", "recorded") if key in one.metadata}
        return cls(prefix + one.name, type, default=one.default, kinds=kinds, **facts)

    @property
    def optional(self) -> bool:
        """Whether it accepts null."""
        return type(None) in get_args(self.type)

    @property
    def plain_type(self) -> Any:
        """Its type without null."""
        if get_origin(self.type) in (Union, types.UnionType):
            return next(one for one in get_args(self.type) if one is not type(None))
        return self.type

    @property
    def choices(self) -> tuple[str, ...]:
        """The accepted words if its type is a Literal, else an empty tuple."""
        return get_args(self.plain_type) if get_origin(self.plain_type) is Literal else ()

    @property
    def wanted(self) -> str:
        """A description of the accepted values, for messages."""
        kind = self.plain_type
        if self.choices:
            words = "one of " + ", ".join(self.choices)
        elif get_origin(kind) is tuple:
            words = "a list of names"
        else:
            words = {bool: "true or false", str: "a text", int: "a whole number", float: "a finite number"}[kind]
        if self.least is not None:
            least = _written(self.least)
            words += f" of at least {least}" if self.most is None else f" from {least} to {_written(self.most)}"
        return words + (", or null" if self.optional else "")

    def read(self, value: Any) -> Any:
        """Convert a value to the field's type; numbers and lists may be given as strings.

        Raises:
            ValueError: if the setting does not accept the value.
        """
        kind = self.plain_type
        if value is None and self.optional:
            return None
        if get_origin(kind) is tuple:
            value = tuple(value.replace(",", " ").split()) if isinstance(value, str) else value
            right = isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value)
            value = tuple(value) if right else value
        elif kind in (int, float):
            value = _number(value, kind)
            right = (self.least is None or value >= self.least) and (self.most is None or value <= self.most)
        else:
            right = value in self.choices if self.choices else isinstance(value, kind)
        if not right:
            raise ValueError(self.wanted)
        return value


def _written(bound: float) -> str:
    return f"{bound:,}" if isinstance(bound, int) else f"{bound:g}"


def _number(value: Any, kind: type) -> int | float:
    """Convert to a finite number. Strings are accepted because YAML reads 1e-4, which has no dot, as a string."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(value)
    if kind is int and isinstance(value, str) and "e" not in value.lower():
        return int(value)
    number = float(value)
    if not math.isfinite(number) or (kind is int and not number.is_integer()):
        raise ValueError(value)
    return number if kind is float else int(value) if isinstance(value, int) else int(number)
