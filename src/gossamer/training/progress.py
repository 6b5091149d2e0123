"""Progress of a training run: a progress bar, and one JSON line per step in ``training.jsonl``."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gossamer.training.trainer import PostTrainer


class _Metrics(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(task.fields.get("metrics", ""))


class StepLog(TrainerCallback):
    """Callback that shows loss, bound, lambda, open fraction, speed and time left, and appends every step to a file.

    Keys of a line: ``step``, ``seconds`` since the run was started or resumed, ``tokens_per_second``,
    ``learning_rate`` and the trainer's measurements (:meth:`gossamer.training.trainer.PostTrainer.batch_objective`).

    Args:
        trainer: the trainer whose measurements are shown.
        label: name of the trained model, in front of the bar.
        file: file to append to; lines of steps that a resumed run repeats are dropped.
        bound: the constraint's bound in nats; None for the dense control.
        tokens_per_step: tokens per step over all devices.
        console: where to draw; if it is not a terminal, a plain line is printed from time to time.
    """

    def __init__(
        self,
        trainer: PostTrainer,
        label: str,
        file: Path,
        *,
        bound: float | None,
        tokens_per_step: int,
        console: Console,
    ) -> None:
        self.trainer, self.label, self.file = trainer, label, file
        self.bound, self.tokens_per_step, self.console = bound, tokens_per_step, console
        columns = (TextColumn("{task.description}"), BarColumn(20), TextColumn("{task.completed}/{task.total}"))
        self.progress = Progress(*columns, _Metrics(), TimeRemainingColumn(), console=console)
        self.task = self.progress.add_task(label, total=None)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Drop the lines of steps that will be repeated, and start the bar at the current step."""
        kept = []
        if self.file.exists():
            lines = self.file.read_text().splitlines()
            kept = [line for line in lines if _step(line) <= state.global_step]
        self.file.write_text("".join(f"{line}\n" for line in kept))
        self.started, self.first_step = time.monotonic(), state.global_step
        if self.console.is_terminal:
            self.progress.start()
        self.progress.update(self.task, total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Append the step and advance the bar."""
        seconds = time.monotonic() - self.started
        speed = (state.global_step - self.first_step) * self.tokens_per_step / seconds
        rate = self.trainer.lr_scheduler.get_last_lr()[0] if self.trainer.lr_scheduler else 0.0
        timing = {"step": state.global_step, "seconds": seconds, "tokens_per_second": speed}
        with self.file.open("a") as stream:
            stream.write(json.dumps({**timing, "learning_rate": rate, **self.trainer.last}) + "\n")
        metrics = self.metrics(speed)
        self.progress.update(self.task, completed=state.global_step, metrics=metrics)
        tenth = max(1, state.max_steps // 10)
        if not self.console.is_terminal and (state.global_step % tenth == 0 or state.global_step == 1):
            left = (state.max_steps - state.global_step) * self.tokens_per_step / speed
            line = f"{self.label} {state.global_step}/{state.max_steps}  {metrics}  {left:.0f} s left"
            self.console.print(line, soft_wrap=True)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Stop the bar."""
        self.progress.stop()

    def metrics(self, speed: float) -> str:
        """Format the step's metrics in one line."""
        last = self.trainer.last
        parts = [f"{self.trainer.label} {last['constrained']:.3f}"]
        if "constrained_held_out" in last:
            parts.append(f"validation {last['constrained_held_out']:.3f}")
        if self.bound is not None:
            parts.append(f"{self.trainer.config.constraint.symbol} {self.bound:.3f}")
        if "multiplier" in last:
            parts.append(f"λ {last['multiplier']:.3g}")
            parts.append(f"open {100 * last['open_fraction']:.2f} %")
        return "  ".join([*parts, f"{speed:.0f} tokens/s"])


@contextmanager
def sampling_shown(console: Console) -> Iterator[Callable[[int, int], None]]:
    """Context manager that yields a callback to show the number of sampled blocks; its first call starts the bar."""
    columns = (TextColumn("{task.description}"), BarColumn(20), TextColumn("{task.completed}/{task.total} blocks"))
    bar = Progress(*columns, TimeRemainingColumn(), console=console)
    task = bar.add_task("sampling text", total=None)
    started, tenths = time.monotonic(), 0

    def show(done: int, total: int) -> None:
        nonlocal tenths
        bar.update(task, completed=done, total=total)
        if console.is_terminal:
            bar.start()
        elif 10 * done // total > tenths:
            tenths = 10 * done // total
            left = (time.monotonic() - started) * (total - done) / done
            console.print(f"sampling text {done}/{total} blocks  {left:.0f} s left", soft_wrap=True)

    try:
        yield show
    finally:
        bar.stop()


def _step(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 1 << 62  # a line cut short by a kill
