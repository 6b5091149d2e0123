"""Make command options from settings, and merge the settings of preset, file and command line."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from gossamer.fields import Setting
from gossamer.runs.presets import find_preset
from gossamer.runs.settings import RunConfig, SettingsSource, settings
from gossamer.runs.settings_file import read_settings

PresetOption = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Model, text and settings by name: gpt2, smollm2, llama-3.2-1b, olmo-2-7b."),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="YAML file with any of the settings that gossamer settings prints."),
]


class WithSettings:
    """A command with options for some settings; its function receives the values that were given as ``given``.

    The options are built when the command is, so constraints registered before then get their options too.

    Args:
        function: the command, which may have further options.
        names: of the settings. A ``*`` after ``constraint`` adds the settings of each kind of constraint. The setting
            ``model`` becomes an argument instead of an option.
    """

    def __init__(self, function: Callable[..., None], names: Sequence[str]) -> None:
        self.function, self.names = function, names
        self.__name__, self.__doc__, self.__module__ = function.__name__, function.__doc__, function.__module__
        self.__annotations__: dict[str, Any] = {}

    @property
    def __signature__(self) -> inspect.Signature:
        own = [one for one in inspect.signature(self.function).parameters.values() if one.name != "given"]
        made = [_parameter(one) for one in self._settings()]
        first = [one for one in made if one.name in ("model", "text")]
        together = [*first, *own, *(one for one in made if one not in first)]
        return inspect.Signature([one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in together])

    def __call__(self, **values: Any) -> None:
        named = [one.name for one in self._settings()]
        given = {name: value for name in named if (value := values.pop(name)) is not None}
        self.function(**values, given=given)

    def _settings(self) -> list[Setting]:
        known = settings()
        found = []
        for name in self.names:
            found.append(known[name.rstrip("*")])
            if name.endswith("*"):
                found += [one for one in known.values() if one.kinds]
        return found


def with_settings(*names: str) -> Callable[[Callable[..., None]], WithSettings]:
    """Turn a function into a command: see :class:`WithSettings`."""
    return lambda function: WithSettings(function, names)


def merge_settings(preset: str | None, config: Path | None, given: Mapping[str, Any]) -> RunConfig:
    """Merge the settings of a run: the command line overrides the file, which overrides the preset.

    Raises:
        GossamerError: naming what is wrong and its source.
    """
    places = []
    if preset is not None:
        places.append(SettingsSource(find_preset(preset).settings, f"the preset {preset}"))
    if config is not None:
        places.append(read_settings(config))
    return RunConfig.from_sources([*places, SettingsSource(given, options=True)])


def _parameter(one: Setting) -> inspect.Parameter:
    help = (f"With {' or '.join(one.kinds)}: " if one.kinds else "") + one.help
    # Typer gets strings: the values are checked later with all other settings, with one-line error messages.
    kind: Any = bool if one.plain_type is bool else str
    if one.choices and one.choices[0] not in help:
        help += f" One of {', '.join(one.choices)}."
    if one.name == "model":
        made: Any = typer.Argument(metavar="MODEL", help=escape(help), show_default=False)
    else:
        if one.plain_type is not bool and one.default not in (MISSING, None, ()):
            help += f" [default: {f'{one.default:,}' if one.plain_type is int else one.default}]"
        made = typer.Option(help=escape(help), show_default=False, metavar=None if kind is bool else _metavar(one))
    return inspect.Parameter(
        one.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, made]
    )


def _metavar(one: Setting) -> str:
    """A short metavar: a wide metavar column narrows the column of explanations in the help."""
    return "NAME" if one.choices else {int: "INT", float: "NUMBER"}.get(one.plain_type, "TEXT")
