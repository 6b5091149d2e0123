"""Settings as fields of dataclasses: each says what it means and which values it takes, once for all who ask."""

import math
import types
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

_T = TypeVar("_T")

LARGEST_SEED = 2**32 - 1
"""That every library takes which draws something here."""


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
        facts: whatever else a reader of the field needs to know, for its metadata.
    """
    known = {"help": help, "least": least, "most": most, **facts}
    return field(default=default, default_factory=default_factory, metadata=known)


def documented(kind: type[_T]) -> type[_T]:
    """The dataclass with the help of its fields in its docstring."""
    lines = [f"    {one.name}: {one.metadata['help']}" for one in fields(kind) if "help" in one.metadata]  # type: ignore[arg-type]
    kind.__doc__ = "\n".join([(kind.__doc__ or "").rstrip(), "", "Attributes:", *lines])
    return kind


@dataclass(frozen=True)
class Setting:
    """A field under the name that users have for it.

    Attributes:
        name: in files; on the command line with dashes.
        type: of its value.
        help: what it means.
        default: its value if nothing is said; ``MISSING`` if it has to be said.
        least, most: the smallest and the largest number that it takes.
        kinds: names of the constraints that it is a setting of; none: it is one of every run.
        recorded: whether it is only written down, not set.
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
        """The setting that a field made by :func:`setting` is."""
        facts = {key: one.metadata[key] for key in ("help", "least", "most", "recorded") if key in one.metadata}
        return cls(prefix + one.name, type, default=one.default, kinds=kinds, **facts)

    @property
    def optional(self) -> bool:
        """Whether it takes null."""
        return type(None) in get_args(self.type)

    @property
    def plain_type(self) -> Any:
        """Its type without null."""
        if get_origin(self.type) in (Union, types.UnionType):
            return next(one for one in get_args(self.type) if one is not type(None))
        return self.type

    @property
    def choices(self) -> tuple[str, ...]:
        """The words that it takes, where only some are right."""
        return get_args(self.plain_type) if get_origin(self.plain_type) is Literal else ()

    @property
    def wanted(self) -> str:
        """What it takes, in words."""
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
        """The value as the dataclass has it; numbers and lists may be given as texts.

        Raises:
            ValueError: if the setting does not take it.
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
    """A finite number of that kind. A text is read as one: YAML takes 1e-4, which lacks a dot, for a text."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(value)
    if kind is int and isinstance(value, str) and "e" not in value.lower():
        return int(value)
    number = float(value)
    if not math.isfinite(number) or (kind is int and not number.is_integer()):
        raise ValueError(value)
    return number if kind is float else int(value) if isinstance(value, int) else int(number)
