"""Post-training under the constraint: minimise the open links while the bounded quantity stays inside its bound.

1. Start: gates are open where attention weights exceed a threshold, the largest one that violates the bound by at most
   one tolerance.
2. Each step minimises the Lagrangian of :mod:`gossamer.training.multiplier` on a batch. Before the update the batch is
   unseen text, so its measurement is the step's violation; a few measurements on validation blocks correct the offset.
   The dual step uses both. :mod:`gossamer.training.pace` can limit how fast gates close.
3. End: the learning rates have fallen to 0. If the bound is violated on the validation blocks, all gate biases are
   shifted by the smallest amount that meets it. If no shift does, the weights are first interpolated towards the dense
   ones. An earlier checkpoint that met the bound with fewer links is used instead.

Reported results use other, held-out blocks.
"""

import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import AutocastKwargs
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from gossamer.measures.language import forward_passes, standard_error_of_sums
from gossamer.measures.losses import cross_entropy
from gossamer.models.attention import counted_links, sampled_gates
from gossamer.models.lora import as_dense
from gossamer.ops import fold_seed
from gossamer.training.checkpoints import checkpoint_error, checkpoints
from gossamer.training.distributed import on_main_process
from gossamer.training.gates import calibrate, open_to
from gossamer.training.interpolation import SHARES, Interpolation
from gossamer.training.multiplier import Multiplier, RunningViolation, lagrangian
from gossamer.training.objective import expected_open_fraction
from gossamer.training.pace import Pace
from gossamer.training.settings import TrainingConfig
from gossamer.training.trainer import PostTrainer

START_TOKENS = 2_048
"""Tokens of the validation text on which the initial gates are determined."""

START_TOLERANCES = 1.0
"""Violation allowed at the start, in tolerances of the constraint; training recovers it."""

SMALLEST_FRACTION = 1e-12
"""Lower limit of the open fraction inside the logarithm, which would otherwise diverge."""

LARGEST_MARGIN = 0.25
"""Upper limit of the margin of one standard error, in tolerances of the constraint."""


@dataclass(frozen=True)
class Validation:
    """Measurements on the validation blocks with hard gates.

    Attributes:
        step: the step after which they were taken.
        constrained: the constrained quantity, in nats.
        stderr: standard error of its distance from the bound, in nats; 0 if there is only one block.
        open_fraction: open links / allowed links.
        calibration: common shift of the gate biases after training; None during training, or if no shift helps.
        interpolation: share of the trained change of the weights that was kept.
    """

    step: int
    constrained: float
    stderr: float
    open_fraction: float
    calibration: float | None = None
    interpolation: float = 1.0


class SparsityTrainer(PostTrainer):
    """Trainer that minimises the expected open links of a gated model under the constraint.

    Args:
        model: the gated model.
        reference: the frozen dense model, for a constraint that needs it; None if only gates and adapters are trained,
            since the model then contains the dense one.
        dense_loss: cross-entropy of the dense model on the validation blocks, in nats.
        config: training settings.
        blocks: training blocks, each used once.
        validation: blocks used neither for training nor for the reported metrics.
        folder: directory of the checkpoints.
        margin: how far inside the bound to aim, in nats; None for one standard error of each measurement, with a limit.
        dense_weights: reads the dense model's weights by name, if they are needed after training; None if only gates
            and adapters are trained.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        reference: PreTrainedModel | None,
        dense_loss: float,
        config: TrainingConfig,
        blocks: Dataset[dict[str, Tensor]],
        validation: Int[Tensor, "blocks tokens"],
        folder: Path,
        *,
        margin: float | None = None,
        dense_weights: Callable[[], Mapping[str, Tensor]] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, config, blocks, folder, **kwargs)
        self.reference = None if reference is None else reference.eval().requires_grad_(False)
        self.constraint = config.constraint
        self.bound = self.constraint.bound(dense_loss)
        self.unit = self.constraint.unit
        self.tolerance = self.constraint.tolerance(dense_loss)
        self.dense_loss = dense_loss
        self.margin = margin
        self.dense_weights = dense_weights or dict
        self.validation = validation
        self.multiplier = Multiplier(config.multiplier, self.steps)
        self.running = RunningViolation(config.multiplier.decay)
        self.pace = Pace(config.closing_rate, self.steps)
        self.reference_fraction: float | None = None
        self.validation_result: Validation | None = None
        self.open_by_layer: Float[Tensor, " layers"] | None = None

    @property
    def label(self) -> str:
        """Short name of the constrained quantity."""
        return self.constraint.label

    @property
    def hard(self) -> bool:
        """Whether the current step trains with hard gates."""
        return self.state.global_step >= round((1 - self.config.hard_fraction) * self.steps)

    @torch.no_grad()
    def prepare(self, *, open_gates: bool) -> None:
        """Before the first step of a new run, set the initial gates if requested, and measure the open fraction.

        Runs identically in all processes.
        """
        model = cast(PreTrainedModel, self.model).eval()
        device = next(model.parameters()).device
        some = self.validation[: max(1, START_TOKENS // self.validation.shape[1])].to(device)
        # accelerate has not wrapped the model yet, so autocast has to be entered here.
        with self.accelerator.autocast(AutocastKwargs(cache_enabled=False)):
            if open_gates:
                dense_logits = self._dense_logits(some) if self.constraint.needs_dense else None

                def violation() -> float:
                    logits = model(input_ids=some, use_cache=False).logits
                    return self._excess(logits, dense_logits, some) - START_TOLERANCES

                open_to(model, some, violation)
            with counted_links(model) as counts:
                model(input_ids=some, use_cache=False)
        self.reference_fraction = expected_open_fraction(counts, self.config.weighting).item()

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Forward and backward pass under the gates of the step, so that recomputed activations use the same gates."""
        # The 0 has no meaning; it keeps the runs of docs/runs.md reproducible.
        seed = fold_seed(self.config.seed, self.state.global_step, 0)
        parts_before = len(self.measured) * self.config.processes + self.args.process_index
        first_row = parts_before * self.config.batch_size
        with nullcontext() if self.hard else sampled_gates(self.model, seed, first_row):
            return cast(Tensor, super().training_step(*args, **kwargs))

    def batch_objective(
        self, model: nn.Module, input_ids: Int[Tensor, "batch tokens"]
    ) -> tuple[Tensor, dict[str, float]]:
        """Compute the Lagrangian on a batch."""
        with counted_links(self.model) as counts:
            logits = model(input_ids=input_ids, use_cache=False).logits
        expected = expected_open_fraction(counts, self.config.weighting)
        opened = torch.stack([count.open_links.sum() for count in counts.values()])
        allowed = torch.stack([count.allowed_links.sum() for count in counts.values()])
        self.open_by_layer = opened / allowed
        dense_logits = self._dense_logits(input_ids) if self.constraint.needs_dense else None
        constrained = self.constraint.measure(logits, dense_logits, input_ids, self.config.prompt_tokens)
        pull = self.constraint.training_loss(constrained, logits, dense_logits, input_ids, self.config.prompt_tokens)
        measured = {
            "constrained": constrained.item(),
            "batch_violation": self._excess(logits.detach(), dense_logits, input_ids, constrained.item()),
            "expected_open_fraction": expected.item(),
            "open_fraction": (opened.sum() / allowed.sum()).item(),
            "sampled": float(not self.hard),
        }
        assert self.reference_fraction is not None
        objective = expected / max(self.reference_fraction, SMALLEST_FRACTION)
        return lagrangian(self.pace.share * objective, pull, self.multiplier.value, self.unit), measured

    def _excess(
        self, logits: Tensor, dense_logits: Tensor | None, input_ids: Tensor, constrained: float | None = None
    ) -> float:
        """Compute the violation on some text, in tolerances, corrected by the dense model's loss on the same text."""
        prompt_tokens = self.config.prompt_tokens
        if constrained is None:
            constrained = self.constraint.measure(logits, dense_logits, input_ids, prompt_tokens).item()
        easier = 0.0
        if self.constraint.relative_to_dense and dense_logits is not None:
            easier = self.dense_loss - cross_entropy(dense_logits, input_ids, prompt_tokens).item()
        return (constrained + easier - self.bound) / self.tolerance

    @torch.no_grad()
    def _dense_logits(self, input_ids: Int[Tensor, "batch tokens"]) -> Float[Tensor, "batch tokens vocab"]:
        if self.reference is None:
            with as_dense(self.model) as dense:
                return cast(Tensor, dense(input_ids=input_ids, use_cache=False).logits)
        device = next(self.reference.parameters()).device
        logits = self.reference(input_ids=input_ids.to(device), use_cache=False).logits
        return cast(Tensor, logits.to(input_ids.device))

    def validate(self) -> Validation:
        """Measure the constrained quantity and the open fraction on the validation blocks, with hard gates."""
        constraint, prompt_tokens = self.constraint, self.config.prompt_tokens
        batches = self.validation.split(2 * self.config.batch_size)
        # All processes take the same number of turns, since sharded weights need all of them in every forward pass.
        turns = range(self.args.process_index, self.config.processes * -(-len(batches) // self.config.processes),
                      self.config.processes)  # fmt: skip

        def measure(logits: Tensor, ids: Tensor) -> list[tuple[float, float]]:
            dense_logits = self._dense_logits(ids) if constraint.needs_dense else None
            found = []
            for row in range(len(ids)):
                one = slice(row, row + 1)
                dense = None if dense_logits is None else dense_logits[one]
                value = constraint.measure(logits[one], dense, ids[one], prompt_tokens).item()
                found.append((value, self._excess(logits[one], dense, ids[one], value) * self.tolerance))
            return found

        with self.compute_loss_context_manager():
            passes = forward_passes(self.model, [batches[turn % len(batches)] for turn in turns], measure)
        sums = torch.zeros(5, dtype=torch.float64)
        for turn, (measured, links) in zip(turns, passes, strict=True):
            if turn < len(batches):
                values, excesses = torch.tensor(measured, dtype=torch.float64).unbind(-1)
                counted = int(links.open_links.sum()), int(links.allowed_links.sum())
                sums += torch.tensor([values.sum(), excesses.sum(), excesses.square().sum(), *counted]).double()
        value, excess, squares, opened, allowed = self.accelerator.reduce(sums.to(self.args.device), "sum").tolist()
        blocks = len(self.validation)
        stderr = standard_error_of_sums(excess, squares, blocks) or 0.0
        return Validation(self.state.global_step, value / blocks, stderr, opened / allowed)

    def finish_step(self) -> None:
        """Take the dual step, after measuring on the validation blocks if that is due."""
        super().finish_step()
        if self.open_by_layer is not None:
            self.open_by_layer = self.accelerator.reduce(self.open_by_layer, "mean")
        self.last["multiplier"], self.last["closing_share"] = self.multiplier.value, self.pace.share
        self.reference_fraction = self.last["expected_open_fraction"]
        if not self.last["sampled"]:
            self.running.add_batch(self.last["batch_violation"])
        step = self.state.global_step
        if step % max(1, self.steps // self.config.validations) == 0 or step == self.steps:
            self.validation_result = self.validate()
            self.running.add_validation(self.violation(self.validation_result), alone=bool(self.last["sampled"]))
        if self.validation_result is not None:
            self.last["constrained_held_out"] = self.validation_result.constrained
        if (violation := self.running.value) is not None:
            self.multiplier.dual_step(violation)
            self.pace.step(self.last["expected_open_fraction"], violation)

    def violation(self, result: Validation) -> float:
        """Compute by how much a measurement exceeds the bound less its margin, in tolerances of the constraint."""
        margin = min(result.stderr, LARGEST_MARGIN * self.tolerance) if self.margin is None else self.margin
        return (result.constrained - self.bound + margin) / self.tolerance

    def best_checkpoint(self) -> tuple[Path, Validation] | None:
        """Find the sparsest intact checkpoint that was validated at its own step and met the bound."""
        held = []
        for path in checkpoints(self.folder):
            result = None if checkpoint_error(path) else _validation(_read_state(path))
            if result is not None and self.violation(result) <= 0 and path.name == f"checkpoint-{result.step}":
                held.append((path, result))
        return min(held, key=lambda pair: pair[1].open_fraction, default=None)

    def superfluous_checkpoints(self) -> list[Path]:
        """List the checkpoints that are neither among the last two nor the best."""
        best = self.best_checkpoint()
        return [path for path in super().superfluous_checkpoints() if best is None or path != best[0]]

    def select_weights(self) -> Validation:
        """Calibrate after training; load the best checkpoint instead if it is sparser or the bound is still missed."""
        best = on_main_process(self.best_checkpoint)
        final = self.calibrate()
        if best is None or (self.violation(final) <= 0 and final.open_fraction <= best[1].open_fraction):
            return final
        self._load_from_checkpoint(str(best[0]))
        self.validation_result = replace(best[1], calibration=0.0)
        return self.validation_result

    def calibrate(self) -> Validation:
        """Bring the model inside its bound, and validate the result.

        The gate biases are shifted if the bound needs it. If no shift meets the bound, the weights are interpolated
        towards the dense model's, and the gates are shifted from there. If that fails too, nothing is changed.
        """
        last = self.validation_result or self.validate()
        final = self._shift_gates(last)
        if final.calibration is None:
            final = self._interpolate() or final
        self.validation_result = final
        return final

    def _shift_gates(self, before: Validation) -> Validation:
        """Shift the gate biases by the smallest amount that meets the bound; ``before`` was measured without one."""
        results: list[Validation] = []

        def violation() -> float:
            results.append(self.validate() if results else before)
            return self.violation(results[-1])

        found = calibrate(cast(PreTrainedModel, self.model), violation)
        return replace(self.validate() if found.shift else before, calibration=found.shift)

    def _interpolate(self) -> Validation | None:
        """Keep the largest share of the trained change with which a shift of the gates meets the bound, if any."""
        self.reshard()
        weights = Interpolation(cast(nn.Module, self.model), self.dense_weights())
        if not weights.possible:
            return None
        for share in SHARES:
            weights.keep(share)
            found = self._shift_gates(self.validate())
            if found.calibration is not None:
                return replace(found, interpolation=share)
            self.reshard()
        weights.keep(1.0)
        return None

    def write_extra_state(self, folder: Path) -> None:
        """Write the state of the dual steps."""
        result = self.validation_result
        state = {
            "multiplier": self.multiplier.state_dict(),
            "running": self.running.state_dict(),
            "pace": self.pace.state_dict(),
            "reference_fraction": self.reference_fraction,
            "validation": None if result is None else asdict(result),
        }
        (folder / _STATE).write_text(json.dumps(state))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            state = _read_state(Path(checkpoint))
            self.multiplier.load_state_dict(state["multiplier"])
            self.running.load_state_dict(state["running"])
            self.pace.load_state_dict(state.get("pace", self.pace.state_dict()))
            self.reference_fraction = state["reference_fraction"]
            self.validation_result = _validation(state)


_STATE = "multiplier.json"


def _read_state(checkpoint: Path) -> dict[str, Any]:
    return dict(json.loads((checkpoint / _STATE).read_text()))


def _validation(state: dict[str, Any]) -> Validation | None:
    return Validation(**state["validation"]) if state["validation"] else None
