"""The settings of a run."""

from dataclasses import dataclass, field
from typing import Any

from gossamer.training.constraint import MultiplierConfig
from gossamer.training.trainer import TrainingConfig


@dataclass(frozen=True)
class RunConfig:
    """What to sparsify, on which text, under which bound.

    Attributes:
        model: ``smollm2``, a local directory or a Hub id.
        text: a local file or directory, a Hub data set, or ``self``.
        seq_len: tokens in a block. The open fraction depends on it, and the loss holds up to about twice it.
        validation_tokens: how much unseen text steers the multiplier; tau is measured on it.
        held_out_tokens: how much other unseen text the figures are measured on.
        tau: bound on the cross-entropy in nats; the dense model's held-out loss plus ``slack`` if None.
        slack: nats above the dense model's loss.
        epsilon: bound on KL(dense || sparse) in nats, for the constraint ``kl``.
        margin: how far inside the bound training aims, and the weights kept are to be, nats; of epsilon at most a
            tenth.
        gate_bias: initial bias of every gate.
        start_from: directory of a finished run of the same model; this run starts from its sparse model (gates and all,
            so that ``gate_bias`` does not matter), the control from its control. None starts both from the dense model.
        lora_rank, lora_alpha: of the adapters, when those are trained.
        lora_targets: the linear maps that they go on; all of the attention if there are none.
        control: train the dense control as well.
        stream: read the text while training, rather than choose blocks of it before.
        stream_workers: processes that read and tokenise it beside each process that trains; 0 for none.
        training: how to train.
    """

    model: str
    text: str
    seq_len: int = 256
    validation_tokens: int = 8_192
    held_out_tokens: int = 32_768
    tau: float | None = None
    slack: float = 0.01
    epsilon: float = 0.05
    margin: float = 0.005
    gate_bias: float = -2.0
    start_from: str | None = None
    lora_rank: int = 16
    lora_alpha: float = 32.0
    lora_targets: tuple[str, ...] = ()
    control: bool = True
    stream: bool = False
    stream_workers: int = 1
    training: TrainingConfig = field(default_factory=TrainingConfig)

    @property
    def tokens_per_step(self) -> int:
        """Training tokens in one optimiser step."""
        return self.training.blocks_per_step * self.seq_len

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "RunConfig":
        """The configuration that ``dataclasses.asdict`` turned into ``values``."""
        training = dict(values["training"])
        training["multiplier"] = MultiplierConfig(**training["multiplier"])
        targets = tuple(values.get("lora_targets", ()))
        return cls(**{**values, "lora_targets": targets, "training": TrainingConfig(**training)})
