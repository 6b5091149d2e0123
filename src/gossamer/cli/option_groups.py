"""Option groups: a command parameter that is a dataclass becomes one option for each of its fields."""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import MISSING, Field, fields, is_dataclass
from enum import Enum
from functools import wraps
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer
from rich.markup import escape

from gossamer.cli.common import split_names
from gossamer.errors import GossamerError
from gossamer.fields import Setting


def with_option_groups(function: Callable[..., None]) -> Callable[..., None]:
    """Turn a function that takes dataclasses of settings into a command.

    Each field made by :func:`gossamer.fields.setting` becomes an option with its name, type, default, bounds and help.
    A field may have two further facts: ``shown_default``, the default as shown in the help, and ``choices``, the
    accepted names. A tuple of names is given as comma-separated text.
    """
    signature = inspect.signature(function)
    groups: dict[str, Any] = {
        name: one.annotation for name, one in signature.parameters.items() if is_dataclass(one.annotation)
    }
    parameters = []
    for name, one in signature.parameters.items():
        made = [_parameter(*each) for each in _settings(groups[name])] if name in groups else [one]
        parameters += [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in made]

    @wraps(function)
    def command(**values: Any) -> None:
        for name, group in groups.items():
            given = {one.name: _value(one, values.pop(one.name)) for _, one in _settings(group)}
            values[name] = group(**given)
        function(**values)

    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {}
    return command


def _settings(group: Any) -> list[tuple[Field[Any], Setting]]:
    hints = get_type_hints(group)
    return [(one, Setting.of(one, hints[one.name])) for one in fields(group) if "help" in one.metadata]


def _flag(setting: Setting) -> str:
    return "--" + setting.name.replace("_", "-")


def _names(name: str, choices: Iterable[str]) -> Any:
    return Enum(name, {choice: choice for choice in choices}, type=str)


def _parameter(field: Field[Any], setting: Setting) -> inspect.Parameter:
    default = None if setting.default is MISSING else setting.default
    options: dict[str, Any] = {
        "help": escape(setting.help),
        "show_default": field.metadata.get("shown_default", True),
        "min": setting.least,
        "max": setting.most,
    }
    kind: Any = setting.plain_type
    if get_origin(kind) is tuple:
        kind, default = str, None if default is None else ",".join(default)
    elif choices := field.metadata.get("choices", setting.choices):
        kind = _names(setting.name, choices)
        default = None if default is None else kind(default)
    option = typer.Option(*([_flag(setting)] if kind is bool else []), **options)
    annotation = Annotated[kind | None if setting.optional else kind, option]  # type: ignore[valid-type]
    return inspect.Parameter(setting.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _value(setting: Setting, value: Any) -> Any:
    """Convert an option's value to the field's type."""
    if isinstance(value, Enum):
        return value.value
    if get_origin(setting.plain_type) is not tuple or value is None:
        return value
    known = get_args(get_args(setting.plain_type)[0])
    asked = split_names(value)
    if not asked or not set(asked) <= set(known):
        raise GossamerError(f"{_flag(setting)} {value!r}: give some of {', '.join(known)}, with commas between")
    return tuple(name for name in known if name in asked)
