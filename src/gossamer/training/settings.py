"""Training settings. This module imports nothing heavy, so that the command line starts quickly."""

from dataclasses import dataclass
from typing import Literal

from gossamer.fields import documented, setting
from gossamer.training.constraints import Constraint, CrossEntropy
from gossamer.training.multiplier import MultiplierConfig

TrainedPart = Literal["all", "attention", "lora"]
Precision = Literal["auto", "fp32", "bf16"]
Weighting = Literal["links", "queries"]


@documented
@dataclass(frozen=True)
class TrainingConfig:
    """How to post-train; the defaults were found by the trials in ``docs/LOG.md``."""

    train: TrainedPart = setting(
        "Weights to train besides the gate biases: all of them, those of the attention, or LoRA adapters.", "all"
    )
    batch_size: int = setting("Blocks per forward pass and process.", 4, least=1, most=2**20)
    gradient_accumulation: int = setting("Forward passes per process in one optimizer step.", 1, least=1, most=2**20)
    processes: int = setting(
        "Number of processes that train together, each on its own part of the batch; set by the launcher.",
        1,
        least=1,
        recorded=True,
    )
    gradient_checkpointing: bool = setting(
        "Store only each layer's input for the backward pass and recompute the rest: less memory, a quarter to a third "
        "more time.",
        False,
    )
    learning_rate: float = setting(
        "Learning rate of the weights between warm-up and decay.", 1e-4, least=0.0, most=1e30
    )
    gate_learning_rate: float | None = setting(
        "Learning rate of the gate biases, on the same schedule. Unset: 0.15 for a run of 60 steps, falling with the "
        "square root of the number of steps.",
        None,
        least=0.0,
        most=1e30,
    )
    warmup: float = setting(
        "Share of the steps, at the start, over which the learning rates rise from 0.", 0.05, least=0.0, most=1.0
    )
    decay: float = setting(
        "Share of the steps, at the end, over which the learning rates fall to 0.", 0.3, least=0.0, most=1.0
    )
    hard_fraction: float = setting(
        "Share of the steps, at the end, that use hard gates; the steps before sample the gates.",
        1.0,
        least=0.0,
        most=1.0,
    )
    max_grad_norm: float = setting("The norm of the gradient is clipped to this.", 1.0, least=0.0, most=1e30)
    fused_optimizer: bool = setting(
        "Use PyTorch's fused AdamW: a sixth of the time on a CPU, and slightly different rounding.", True
    )
    constraint: Constraint = setting("What is bounded.", default_factory=CrossEntropy)
    weighting: Weighting = setting(
        "What the objective weights equally: every link (links), or every query (queries), which keeps short prompts "
        "sparse too.",
        "links",
    )
    multiplier: MultiplierConfig = setting("How lambda moves.", default_factory=MultiplierConfig, prefix="multiplier_")
    closing_rate: float | None = setting(
        "How far the logarithm of the open fraction may fall over a run that stays one tolerance inside its bound; 10 "
        "ended with fewer links in two of three trials under a bound on the KL (docs/LOG.md). Unset: no limit.",
        None,
        least=1e-3,
        most=1e6,
    )
    validations: int = setting(
        "Measurements on the validation blocks, spread evenly over a run.", 8, least=1, most=2**40
    )
    prompt_tokens: int = setting(
        "Tokens at the start of every block that are given and do not count in the loss.", 0, least=0, most=2**24
    )
    precision: Precision = setting(
        "Precision of the matrix products; weights and optimiser state stay float32. auto: bf16 where the machine has "
        "instructions for it, else fp32.",
        "auto",
    )
    checkpoint_every: int = setting("Steps between checkpoints; 0 for none.", 100, least=0, most=2**40)
    seed: int = setting("Seed of everything random.", 0, least=0, most=2**32 - 1)

    @property
    def blocks_per_step(self) -> int:
        """Blocks per optimiser step, over all forward passes and processes."""
        return self.batch_size * self.gradient_accumulation * self.processes
