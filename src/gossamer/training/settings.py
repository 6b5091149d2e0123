"""What can be set of a training. Nothing heavy is imported here, so the command line offers it without delay."""

from dataclasses import dataclass
from typing import Literal

from gossamer.fields import documented, setting
from gossamer.training.constraints import Constraint, CrossEntropy
from gossamer.training.multiplier import MultiplierConfig

TrainedPart = Literal["all", "attention", "lora"]
Precision = Literal["fp32", "bf16"]
Weighting = Literal["links", "queries"]


@documented
@dataclass(frozen=True)
class TrainingConfig:
    """How to post-train; the defaults were found by the trials in ``docs/LOG.md``."""

    train: TrainedPart = setting(
        "Weights to train besides the gate biases: all, the attention's, or adapters (lora).", "all"
    )
    batch_size: int = setting("Blocks in one forward pass of one process.", 4, least=1, most=2**20)
    gradient_accumulation: int = setting("Forward passes of each process in one step.", 1, least=1, most=2**20)
    processes: int = setting(
        "How many train together, each on its own part of a step's batch; what started them says it.",
        1,
        least=1,
        recorded=True,
    )
    gradient_checkpointing: bool = setting(
        "Keep only what goes into each layer for the backward pass and compute the rest again: less memory for a "
        "quarter to a third more time.",
        False,
    )
    learning_rate: float = setting("Of the weights, between warm-up and decay.", 1e-4, least=0.0, most=1e30)
    gate_learning_rate: float | None = setting(
        "Of the gate biases, on the same schedule; 0.15 for 60 steps, less for more by the root of their number, if "
        "it is not given.",
        None,
        least=0.0,
        most=1e30,
    )
    warmup: float = setting("Share of the steps over which the rates rise from 0.", 0.05, least=0.0, most=1.0)
    decay: float = setting("Share of the steps, at the end, over which the rates fall to 0.", 0.3, least=0.0, most=1.0)
    hard_fraction: float = setting(
        "Share of the steps, at the end, trained with hard gates; before them gates are sampled.",
        1.0,
        least=0.0,
        most=1.0,
    )
    max_grad_norm: float = setting("The gradient's norm is clipped to it.", 1.0, least=0.0, most=1e30)
    fused_optimizer: bool = setting(
        "AdamW in one pass over memory: a sixth of the time on a CPU. It rounds otherwise than in many.", True
    )
    constraint: Constraint = setting("What is bounded.", default_factory=CrossEntropy)
    weighting: Weighting = setting(
        "What counts alike in the objective: every link (links), or every query (queries), which keeps short prompts "
        "sparse too.",
        "links",
    )
    multiplier: MultiplierConfig = setting("How lambda moves.", default_factory=MultiplierConfig, prefix="multiplier_")
    validations: int = setting(
        "Measurements on the validation blocks, spread evenly over a run.", 8, least=1, most=2**40
    )
    prompt_tokens: int = setting(
        "Tokens at the start of every block that are given: the loss does not ask for them.", 0, least=0, most=2**24
    )
    precision: Precision = setting("Of the matrix products; weights and optimiser state stay float32.", "bf16")
    checkpoint_every: int = setting("Steps between checkpoints; 0: none.", 100, least=0, most=2**40)
    seed: int = setting("Of data order, noise and everything else random.", 0, least=0, most=2**32 - 1)

    @property
    def blocks_per_step(self) -> int:
        """Blocks in one optimiser step, over its forward passes and all processes."""
        return self.batch_size * self.gradient_accumulation * self.processes
