"""A new kind of constraint, defined in this file and one line of the registry, works from settings to page."""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from jaxtyping import Float, Int
from torch import Tensor

from gossamer.cli import main
from gossamer.fields import setting
from gossamer.measures.language import LanguageMetrics, measure_language, standard_error
from gossamer.measures.losses import cross_entropy, kl_divergence
from gossamer.report.records import load_records
from gossamer.report.series import training_charts
from gossamer.runs.record import Run, load_both
from gossamer.training.constraints import CONSTRAINTS, Constraint, Outcome
from settings_files import config


@dataclass(frozen=True)
class Surprise(Constraint):
    """Half the cross-entropy and half the divergence."""

    name: ClassVar[str] = "surprise"
    symbol: ClassVar[str] = "σ"
    label: ClassVar[str] = "surprise"
    bound_name: ClassVar[str] = "sigma"
    summary: ClassVar[str] = "half the cross-entropy and half the KL, at most the dense model's and so many nats"
    needs_dense: ClassVar[bool] = True

    over: float = setting("Nats above half the dense model's loss.", 0.5, least=0.0)

    def bound(self, dense_loss: float) -> float:
        return dense_loss / 2 + self.over

    def measure(
        self,
        logits: Float[Tensor, "batch tokens vocab"],
        dense_logits: Float[Tensor, "batch tokens vocab"] | None,
        input_ids: Int[Tensor, "batch tokens"],
        prompt_tokens: int = 0,
    ) -> Float[Tensor, ""]:
        assert dense_logits is not None
        loss = cross_entropy(logits, input_ids, prompt_tokens)
        return (loss + kl_divergence(dense_logits, logits, prompt_tokens)) / 2

    def outcome(self, sparse: LanguageMetrics, dense: LanguageMetrics) -> Outcome:
        assert sparse.kls is not None
        values = (sparse.losses + sparse.kls) / 2
        return Outcome(values.mean().item(), self.bound(dense.loss), standard_error(values - dense.losses / 2))


@pytest.fixture
def registered() -> Iterator[None]:
    CONSTRAINTS["surprise"] = Surprise
    yield
    del CONSTRAINTS["surprise"]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """A function that runs the command line in this process and returns its output."""

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["gossamer", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "400")
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        assert ended.value.code == 0, printed.err
        return printed.out

    return run


@pytest.mark.usefixtures("registered")
def test_a_kind_is_one_file_and_one_line(saved_llama: Path, text: Path, tmp_path: Path, command) -> None:
    settings = config(validations=3, precision="fp32", validation_tokens=64, held_out_tokens=128)
    line = ["--text", text, "--tokens", 6 * 64, "--seq-len", 16, "--no-control", *settings]
    asked = ["--constraint", "surprise", "--over", 0.25, "--out", tmp_path / "run"]
    printed = command("sparsify", saved_llama, *line, *asked)
    assert "sparse 6/6  surprise " in printed
    assert "  σ " in printed
    run = Run(tmp_path / "run")
    assert run.config().training.constraint == Surprise(over=0.25)
    bound = run.record()["measured"]["loss_dense"] / 2 + 0.25
    words = {"name": "surprise", "symbol": "σ", "label": "surprise", "bound": bound}
    assert run.record()["constraint"] == words
    dense, sparse, _ = load_both(run)
    unseen = measure_language(sparse, run.blocks("validation"), dense=dense)
    assert unseen.kl is not None
    final = run.record()["measured"]["selected"]
    assert final["constrained"] == pytest.approx((unseen.loss + unseen.kl) / 2, rel=1e-4)

    command("evaluate", run.folder)
    metrics = json.loads(run.metrics.read_text())
    assert metrics["constraint_value"] == pytest.approx((metrics["loss_sparse"] + metrics["kl"]) / 2)
    assert metrics["constraint_bound"] == metrics["sigma"] == metrics["loss_dense"] / 2 + 0.25
    assert metrics["constraint_met"] == (metrics["constraint_value"] <= metrics["constraint_bound"])
    assert metrics["tau"] is metrics["epsilon"] is None
    shown = command("inspect", run.folder)
    assert f"held-out surprise {metrics['constraint_value']:.4f} nat, bound {metrics['constraint_bound']:.4f}" in shown
    assert f"bound on the surprise: σ = {metrics['constraint_bound']:.4f}" in " ".join(shown.split())

    records = load_records(run.folder)
    chart = training_charts(records)[0]
    assert (chart.title, chart.y) == ("The constraint: surprise", "surprise (nats)")
    assert chart.series[-1].points[0][1] == metrics["constraint_bound"]
    assert "bound on the surprise (nats)" in records.summary()
    command("report", run.folder, "--figures", tmp_path / "figures")
    assert "The constraint: surprise" in (run.folder / "report.html").read_text()
    assert (tmp_path / "figures" / "training_constraint.svg").exists()


@pytest.mark.usefixtures("registered")
def test_its_settings_are_options_and_stand_in_the_printed_file(command) -> None:
    shown = command("sparsify", "--help")
    assert "surprise: half the cross-entropy and half the KL" in shown
    assert "With surprise: Nats above half the dense model's loss. [default: 0.5]" in shown
    assert "# over: 0.5" in command("settings")


@pytest.mark.usefixtures("registered")
def test_its_gradient_reaches_the_sparse_logits_alone() -> None:
    logits, dense = (torch.randn(2, 5, 7, requires_grad=True) for _ in range(2))
    Surprise().measure(logits, dense, torch.randint(7, (2, 5))).backward()
    assert logits.grad is not None
    assert dense.grad is None
