"""The settings of a run, and the flat mapping from name to value that files and the command line have of them.

The fields of the dataclasses say all of it: name, type, default, help and range. Of nested dataclasses the fields stand
beside the others: those of the multiplier begin with ``multiplier_``, and the constraint is named by its kind, with the
settings of that kind beside it.
"""

import math
import types
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from gossamer.errors import GossamerError
from gossamer.fields import documented, setting
from gossamer.training.constraints import CONSTRAINTS, Constraint
from gossamer.training.trainer import TrainingConfig


@documented
@dataclass(frozen=True)
class RunConfig:
    """What to sparsify, on which text, under which bound."""

    model: str = setting("What to sparsify: smollm2, a directory with a saved model, or a Hub id.")
    text: str = setting("Training text: a local file or directory, a Hub data set, or self.")
    seq_len: int = setting("Tokens in a training block. Train at the length you need.", 256)
    validation_tokens: int = setting("Unseen text that the bound is held on during training.", 8_192, least=1)
    held_out_tokens: int = setting("Other unseen text, to measure the figures on.", 32_768, least=1)
    margin: float = setting(
        "How far inside the bound training aims, and the weights kept are to be, nats; of epsilon at most a tenth. "
        "More where little text steers it.",
        0.005,
        least=0.0,
    )
    gate_bias: float = setting("Initial bias of every gate; higher starts with more links open.", -2.0)
    start_from: str | None = setting(
        "Directory of a finished run of MODEL: start from its sparse model and gates, the control from its control. "
        "The bound stays the dense model's.",
        None,
    )
    lora_rank: int = setting("Rank of the adapters.", 16, least=1)
    lora_alpha: float = setting("Adapters count lora_alpha / lora_rank times.", 32.0, least=1e-3)
    lora_targets: tuple[str, ...] = setting(
        "Linear maps that adapters go on, as in [q_proj, v_proj, mlp.up_proj]; none: all of the attention.", ()
    )
    control: bool = setting("Also fine-tune the dense model on the same text, for comparison.", True)
    stream: bool = setting("Read the text while training, for texts too large to choose blocks from.", False)
    stream_workers: int = setting("Processes that read and tokenise a stream, beside each one that trains.", 1, least=0)
    training: TrainingConfig = setting("How to train.", default_factory=TrainingConfig)

    @property
    def tokens_per_step(self) -> int:
        """Training tokens in one optimiser step."""
        return self.training.blocks_per_step * self.seq_len

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, source: str = "") -> "RunConfig":
        """The configuration that a flat mapping describes; what it leaves out has its default.

        Args:
            values: by name of the setting.
            source: the file that they come from, for what is said of them.

        Raises:
            GossamerError: naming the source, the setting and what it takes.
        """
        checked = checked_values(values, source)
        config: RunConfig = _built(cls, checked)
        config.training.constraint.check()
        return config

    def to_dict(self) -> dict[str, Any]:
        """The flat mapping that :meth:`from_dict` makes this configuration of; of what JSON and YAML can write."""
        return dict(_flat(self))

    def check(self) -> None:
        """Stop at values that a setting does not take.

        Raises:
            GossamerError: naming the setting and what it takes.
        """
        RunConfig.from_dict(self.to_dict())


@dataclass(frozen=True)
class Setting:
    """One setting.

    Attributes:
        name: in files; on the command line with dashes.
        field: the dataclass field: default, help, range.
        type: of its value.
        kinds: names of the constraints that it is a setting of; none: it is one of every run.
    """

    name: str
    field: Field[Any]
    type: Any
    kinds: tuple[str, ...] = ()

    @property
    def help(self) -> str:
        """What it means."""
        if self.name == "constraint":
            return "What is bounded. " + " ".join(f"{name}: {kind.summary}." for name, kind in CONSTRAINTS.items())
        return str(self.field.metadata["help"]) + (f" For {' and '.join(self.kinds)}." if self.kinds else "")

    @property
    def default(self) -> Any:
        """Its value if nothing is said; ``MISSING`` if it has to be said."""
        if self.field.default_factory is not MISSING:
            return self.field.default_factory().name
        return self.field.default

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
    def wanted(self) -> str:
        """What it takes, in words."""
        kind, least, most = self.plain_type, self.field.metadata.get("least"), self.field.metadata.get("most")
        if get_origin(kind) is Literal:
            words = "one of " + ", ".join(get_args(kind))
        elif get_origin(kind) is tuple:
            words = "a list of names"
        elif kind in (int, float):
            words = "a whole number" if kind is int else "a finite number"
            if least is not None:
                words += f" of at least {least:,g}" if most is None else f" from {least:,g} to {most:,g}"
        else:
            words = {bool: "true or false", str: "a text"}[kind]
        return words + (", or null" if self.optional else "")

    def read(self, value: Any) -> Any:
        """The value as the dataclass has it.

        Raises:
            ValueError: if the setting does not take it.
        """
        kind = self.plain_type
        if value is None and self.optional:
            return None
        if get_origin(kind) is Literal:
            right = value in get_args(kind)
        elif get_origin(kind) is tuple:
            value = tuple(value.replace(",", " ").split()) if isinstance(value, str) else tuple(value)
            right = all(isinstance(name, str) for name in value)
        elif kind in (int, float):
            value = self._number(value)
            least, most = self.field.metadata.get("least"), self.field.metadata.get("most")
            right = (least is None or value >= least) and (most is None or value <= most)
        else:
            right = isinstance(value, kind)
        if not right:
            raise ValueError
        return value

    def _number(self, value: Any) -> int | float:
        """A number; YAML has 1e-4, which lacks a dot, as a text."""
        if isinstance(value, bool):
            raise ValueError
        number = float(value)
        if not math.isfinite(number) or (self.plain_type is int and not number.is_integer()):
            raise ValueError
        return int(value if isinstance(value, int) else number) if self.plain_type is int else number


def settings() -> dict[str, Setting]:
    """All settings by name, in the order of the fields."""
    found: dict[str, Setting] = {}
    for one in _settings_of(RunConfig):
        if one.name in found:  # two kinds of constraint that call a setting the same
            one = Setting(one.name, found[one.name].field, one.type, (*found[one.name].kinds, *one.kinds))
        found[one.name] = one
    return found


def checked_values(values: Mapping[str, Any], source: str = "") -> dict[str, Any]:
    """The values of a flat mapping as the dataclasses have them.

    Raises:
        GossamerError: naming the source, the setting and what it takes.
    """
    known, begin = settings(), f"{source}: " if source else ""
    found = {}
    for name, value in values.items():
        if name not in known:
            raise GossamerError(f"{begin}there is no setting {name!r}; gossamer settings prints all that there are")
        try:
            found[name] = known[name].read(value)
        except (TypeError, ValueError) as error:
            raise GossamerError(f"{begin}{name} {value!r} cannot be used; give {known[name].wanted}") from error
    kind = found.get("constraint", known["constraint"].default)
    for name in found:
        if known[name].kinds and kind not in known[name].kinds:
            raise GossamerError(
                f"{begin}{name} is a setting of the constraint {' and '.join(known[name].kinds)}, not of {kind}; "
                f"leave it out, or give constraint: {known[name].kinds[0]}"
            )
    for name, one in known.items():
        if one.default is MISSING and name not in found:
            raise GossamerError(f"{begin}{name} is not given; give {one.wanted}: {one.help}")
    return found


def _settings_of(kind: type[Any], prefix: str = "") -> Iterator[Setting]:
    hints = get_type_hints(kind)
    for one in fields(kind):
        hint = hints[one.name]
        if hint is Constraint:
            yield Setting(one.name, one, Literal[tuple(CONSTRAINTS)])  # type: ignore[valid-type]
            for name, constraint in CONSTRAINTS.items():
                types_of = get_type_hints(constraint)
                for own in fields(constraint):
                    yield Setting(own.name, own, types_of[own.name], (name,))
        elif is_dataclass(hint):
            yield from _settings_of(hint, one.metadata.get("prefix", ""))
        else:
            yield Setting(prefix + one.name, one, hint)


def _built(kind: type[Any], values: Mapping[str, Any], prefix: str = "") -> Any:
    hints = get_type_hints(kind)
    given: dict[str, Any] = {}
    for one in fields(kind):
        hint = hints[one.name]
        if hint is Constraint:
            default: Any = one.default_factory
            given[one.name] = _built(CONSTRAINTS[values.get(one.name, default().name)], values)
        elif is_dataclass(hint):
            given[one.name] = _built(hint, values, one.metadata.get("prefix", ""))
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
