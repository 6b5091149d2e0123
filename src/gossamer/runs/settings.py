"""The settings of a run, and their flat mapping from name to value for files and the command line.

The fields of the dataclasses define the name, type, default, help and range of each setting. The mapping flattens
nested dataclasses: names of the multiplier's settings begin with ``multiplier_``; ``constraint`` is the name of a kind,
and the settings of that kind are on the same level.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from difflib import get_close_matches
from typing import Any, Literal, get_type_hints

from gossamer.errors import GossamerError
from gossamer.fields import Setting, documented, setting
from gossamer.names import SELF, SMOLLM2
from gossamer.training.constraints import CONSTRAINTS, Constraint
from gossamer.training.settings import Precision, TrainingConfig


@documented
@dataclass(frozen=True)
class RunConfig:
    """What to sparsify, on which text, under which bound."""

    model: str = setting("What to sparsify: smollm2, a directory with a saved model, or a Hub id.")
    text: str = setting(
        "Training text: a .txt, .jsonl or .json file (documents under 'text'; also .gz, .bz2, .xz, .zst), a directory "
        "of such files, a Hub data set (org/name or hub:NAME:CONFIG:SPLIT), or 'self': sampled from the model."
    )
    tokens: int = setting("Training tokens.", 1_000_000, least=1, most=10**15)
    seq_len: int = setting("Tokens in a training block. Train at the length you need.", 256, least=2, most=2**24)
    validation_tokens: int = setting(
        "Tokens of unseen text on which training checks the bound.", 8_192, least=1, most=10**15
    )
    held_out_tokens: int = setting(
        "Tokens of further unseen text on which the final metrics are measured.", 32_768, least=1, most=10**15
    )
    margin: float | None = setting(
        "Nats by which training aims inside the bound on the validation text. Unset: one standard error.",
        None,
        least=0.0,
        most=1e4,
    )
    gate_bias: float | None = setting(
        "Initial bias of every gate; a higher bias opens more links. Unset: found from the model and the bound.",
        None,
        least=-1e4,
        most=1e4,
    )
    start_from: str | None = setting(
        "Directory of a finished run of the same model: start from its sparse model and control. The bound stays the "
        "dense model's.",
        None,
    )
    lora_rank: int = setting("Rank of the adapters.", 16, least=1, most=2**20)
    lora_alpha: float = setting("Adapters are scaled by lora_alpha / lora_rank.", 32.0, least=1e-3, most=1e6)
    lora_targets: tuple[str, ...] = setting(
        "Linear maps to put adapters on, as in [q_proj, v_proj, mlp.up_proj]. Empty: all of the attention.", ()
    )
    control: bool = setting("Also fine-tune the dense model on the same text, for comparison.", True)
    stream: bool = setting("Read the text during training instead of before it, for texts too large to load.", False)
    stream_workers: int = setting(
        "Processes that read and tokenise a streamed text for each training process.", 1, least=0, most=2**10
    )
    training: TrainingConfig = setting("How to train.", default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        # Absolute paths work from any folder. smollm2 and self are always names, even if such a file exists.
        local = {"model": os.path.isdir, "text": os.path.exists, "start_from": os.path.exists}
        for name, is_there in local.items():
            value = getattr(self, name)
            if value not in (None, SMOLLM2, SELF) and is_there(value):
                object.__setattr__(self, name, os.path.abspath(value))

    @property
    def tokens_per_step(self) -> int:
        """Training tokens in one optimiser step."""
        return self.training.blocks_per_step * self.seq_len

    @property
    def steps(self) -> int:
        """Number of optimiser steps, as many as ``tokens`` fills; at least one."""
        return max(1, self.tokens // self.tokens_per_step)

    @property
    def tokens_trained(self) -> int:
        """Training tokens in all steps."""
        return self.steps * self.tokens_per_step

    def in_processes(self, count: int) -> "RunConfig":
        """Copy the configuration for ``count`` processes that train together."""
        return replace(self, training=replace(self.training, processes=count))

    def in_precision(self, precision: Precision) -> "RunConfig":
        """Copy the configuration with another precision."""
        return replace(self, training=replace(self.training, precision=precision))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, source: str = "") -> "RunConfig":
        """Create a configuration from a recorded flat mapping; see :meth:`from_sources`."""
        return cls.from_sources([SettingsSource(values, source, recorded=True)])

    @classmethod
    def from_sources(cls, places: Sequence["SettingsSource"]) -> "RunConfig":
        """Combine the settings of several sources; later sources override earlier ones.

        A setting that no source gives has its default. If a source chooses another constraint, the settings of the
        previous constraint in earlier sources are dropped.

        Raises:
            GossamerError: naming the source, the setting and the values that it accepts.
        """
        known = settings()
        read = [place.read(known) for place in places]
        chosen = max((at for at, values in enumerate(read) if "constraint" in values), default=-1)
        kind = read[chosen]["constraint"] if chosen >= 0 else known["constraint"].default
        found: dict[str, Any] = {}
        for at, (place, values) in enumerate(zip(places, read, strict=True)):
            for name, value in values.items():
                kinds = known[name].kinds
                if not kinds or kind in kinds:
                    found[name] = value
                elif at >= chosen:
                    raise GossamerError(
                        f"{place.called(name)} is a setting of the constraint {' and '.join(kinds)}, not of {kind}; "
                        f"leave it out, or give {place.called('constraint')} {kinds[0]}"
                    )
        for name, one in known.items():
            if one.default is MISSING and name not in found:
                raise GossamerError(f"{places[-1].called(name)} is not given: {one.help}")
        config: RunConfig = _built(cls, found)
        config.training.constraint.check()
        return config

    def to_dict(self) -> dict[str, Any]:
        """Create the flat mapping that :meth:`from_dict` reads; JSON and YAML can represent all of its values."""
        return dict(_flat(self))

    def check(self) -> None:
        """Raise if a setting has a value that it does not accept.

        Raises:
            GossamerError: naming the setting and the values that it accepts.
        """
        RunConfig.from_dict(self.to_dict())


@dataclass(frozen=True)
class SettingsSource:
    """Settings from one source, such as a file or the command line.

    Attributes:
        values: values by name.
        source: the file, or the user's name for another source; empty for none.
        options: whether they come from the command line, where names are spelled with dashes.
        recorded: whether a run recorded them; such settings include those that users cannot set.
    """

    values: Mapping[str, Any]
    source: str = ""
    options: bool = False
    recorded: bool = False

    def called(self, name: str) -> str:
        """Get the name of a setting as the user writes it in this source."""
        if self.options:
            return name.upper() if name == "model" else "--" + name.replace("_", "-")
        return f"{self.source}: {name}" if self.source else name

    def read(self, known: Mapping[str, Setting]) -> dict[str, Any]:
        """Convert the values to the types of the dataclass fields.

        Raises:
            GossamerError: naming the source, the setting and the values that it accepts.
        """
        found = {}
        for name, value in self.values.items():
            if name not in known or (known[name].recorded and not self.recorded):
                near = get_close_matches(str(name), [one for one in known if not known[one].recorded], 1)
                hint = f"did you mean {near[0]}?" if near else "gossamer settings prints all that there are"
                raise GossamerError(f"{self.called(str(name))} is no setting; {hint}")
            try:
                found[name] = known[name].read(value)
            except ValueError as error:
                said = value if self.options else repr(value)
                raise GossamerError(f"{self.called(name)} {said} cannot be used; give {known[name].wanted}") from error
        return found


def settings() -> dict[str, Setting]:
    """Get all settings by name, in the order of the fields."""
    found: dict[str, Setting] = {}
    for one in _settings_of(RunConfig):
        if one.name in found:  # two kinds of constraint share the name of a setting
            one = replace(found[one.name], kinds=(*found[one.name].kinds, *one.kinds))
        found[one.name] = one
    return found


def _settings_of(kind: type[Any], prefix: str = "") -> Iterator[Setting]:
    hints: dict[str, Any] = get_type_hints(kind)
    for one in fields(kind):
        hint = hints[one.name]
        if hint is Constraint:
            yield from _constraint_settings(one.name, _default_kind(one).name)
        elif is_dataclass(hint):
            yield from _settings_of(hint, one.metadata.get("prefix", ""))  # type: ignore[arg-type]
        else:
            yield Setting.of(one, hint, prefix=prefix)


def _constraint_settings(name: str, default: str) -> Iterator[Setting]:
    """Yield the setting that chooses the kind of constraint, then the settings of every kind."""
    summary = ". ".join(f"{kind.name}: {kind.summary}" for kind in CONSTRAINTS.values())
    yield Setting(name, Literal[tuple(CONSTRAINTS)], f"What is bounded. {summary}.", default)
    for kind in CONSTRAINTS.values():
        hints = get_type_hints(kind)
        for own in fields(kind):
            yield Setting.of(own, hints[own.name], kinds=(kind.name,))


def _default_kind(one: Any) -> type[Constraint]:
    return type(one.default_factory())


def _built(kind: type[Any], values: Mapping[str, Any], prefix: str = "") -> Any:
    hints: dict[str, Any] = get_type_hints(kind)
    given: dict[str, Any] = {}
    for one in fields(kind):
        hint = hints[one.name]
        if hint is Constraint:
            given[one.name] = _built(CONSTRAINTS[values.get(one.name, _default_kind(one).name)], values)
        elif is_dataclass(hint):
            given[one.name] = _built(hint, values, one.metadata.get("prefix", ""))  # type: ignore[arg-type]
        elif prefix + one.name in values:
            given[one.name] = values[prefix + one.name]
    return kind(**given)


def _flat(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for one in fields(config):
        value = getattr(config, one.name)
        if isinstance(value, Constraint):
            yield one.name, value.name
            yield from _flat(value)
        elif is_dataclass(value):
            yield from _flat(value, one.metadata.get("prefix", ""))
        else:
            yield prefix + one.name, list(value) if isinstance(value, tuple) else value
