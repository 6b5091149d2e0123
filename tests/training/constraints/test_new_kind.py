"""A kind of constraint that only this file and one line in the registry know of, from the settings to the page."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from jaxtyping import Float, Int
from torch import Tensor

from gossamer.evaluation.evaluate import evaluate_run, summary_tables, verdict
from gossamer.fields import setting
from gossamer.measures.language import LanguageFigures, measure_language, standard_error
from gossamer.measures.losses import cross_entropy, kl_divergence
from gossamer.report.html import write_report
from gossamer.report.plots import save_figures
from gossamer.report.records import load_records
from gossamer.report.series import training_charts
from gossamer.runs.job import post_train
from gossamer.runs.record import load_both
from gossamer.runs.settings import RunConfig
from gossamer.training.constraints import CONSTRAINTS, Constraint, Outcome


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

    def outcome(self, sparse: LanguageFigures, dense: LanguageFigures) -> Outcome:
        assert sparse.kls is not None
        values = (sparse.losses + sparse.kls) / 2
        return Outcome(values.mean().item(), self.bound(dense.loss), standard_error(values - dense.losses / 2))


@pytest.fixture
def registered() -> Iterator[None]:
    CONSTRAINTS["surprise"] = Surprise
    yield
    del CONSTRAINTS["surprise"]


@pytest.mark.usefixtures("registered")
def test_a_kind_is_one_file_and_one_line(saved_llama: Path, text: Path, tmp_path: Path) -> None:
    asked = {"model": str(saved_llama), "text": str(text), "seq_len": 16, "tokens": 6 * 4 * 16, "validations": 3,
             "precision": "fp32", "validation_tokens": 64, "held_out_tokens": 128, "control": False,
             "constraint": "surprise", "over": 0.25}  # fmt: skip
    run = post_train(RunConfig.from_dict(asked), tmp_path / "run")
    assert run.config().training.constraint == Surprise(over=0.25)
    bound = run.record()["measured"]["loss_dense"] / 2 + 0.25
    words = {"name": "surprise", "symbol": "σ", "label": "surprise", "bound": bound}
    assert run.record()["constraint"] == words
    dense, sparse, _ = load_both(run)
    unseen = measure_language(sparse, run.blocks("validation"), dense=dense)
    assert unseen.kl is not None
    final = run.record()["measured"]["selected"]
    assert final["constrained"] == pytest.approx((unseen.loss + unseen.kl) / 2, rel=1e-4)

    metrics = evaluate_run(run)
    assert metrics["constraint_value"] == pytest.approx((metrics["loss_sparse"] + metrics["kl"]) / 2)
    assert metrics["constraint_bound"] == metrics["sigma"] == metrics["loss_dense"] / 2 + 0.25
    assert metrics["constraint_met"] == (metrics["constraint_value"] <= metrics["constraint_bound"])
    assert metrics["tau"] is metrics["epsilon"] is None
    assert f"held-out surprise {metrics['constraint_value']:.4f} nat" in verdict(metrics)
    assert "bound on the surprise: σ = " in str(summary_tables(metrics)[0].caption)

    records = load_records(run.folder)
    chart = training_charts(records)[0]
    assert (chart.title, chart.y) == ("The constraint: surprise", "surprise (nats)")
    assert chart.series[-1].points[0][1] == metrics["constraint_bound"]
    assert "bound on the surprise (nats)" in records.summary()
    assert "The constraint: surprise" in write_report(run.folder).read_text()
    assert save_figures(records, tmp_path / "figures")


@pytest.mark.usefixtures("registered")
def test_its_gradient_reaches_the_sparse_logits_alone() -> None:
    logits, dense = (torch.randn(2, 5, 7, requires_grad=True) for _ in range(2))
    Surprise().measure(logits, dense, torch.randint(7, (2, 5))).backward()
    assert logits.grad is not None
    assert dense.grad is None
