"""Records of earlier runs in results/: read, shown and evaluated like new ones."""

import json
from pathlib import Path

import pytest

from gossamer.evaluation.tables import summary_tables, verdict
from gossamer.report.records import load_records
from gossamer.report.series import training_charts
from gossamer.runs.record import Run
from gossamer.runs.upgrade import upgraded_metrics, upgraded_record
from gossamer.training.constraints import CrossEntropy, KLDivergence

RECORDS = Path(__file__).parents[2] / "results" / "smollm2" / "records"


def test_the_settings_of_an_earlier_run_are_found() -> None:
    config = Run(RECORDS / "kl-005-slow").config()
    assert config.training.constraint == KLDivergence(epsilon=0.05)
    assert (config.model, config.seq_len, config.training.learning_rate) == ("smollm2", 256, 1e-4)
    assert config.tokens == config.tokens_trained == 153_600
    assert Run(RECORDS / "adapted-further").config().training.constraint == CrossEntropy(slack=0.05)
    for file in RECORDS.glob("*/config.json"):
        Run(file.parent).config()


def test_an_earlier_record_says_in_words_what_was_bounded() -> None:
    record = Run(RECORDS / "kl-005-slow").record()
    assert record["constraint"] == {"name": "kl", "symbol": "ε", "label": "KL", "bound": 0.05}
    assert "slack" not in record["config"]
    ce = Run(RECORDS / "ce").record()
    assert ce["constraint"]["bound"] == ce["measured"]["tau"]
    assert upgraded_record(record) == record


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("kl-005-slow", "Constraint met: held-out KL 0.0391 nat, bound 0.0500."),
        ("long", "Constraint NOT met: held-out loss 3.4538 nat, bound 3.4413, over by 0.0125."),
    ],
)
def test_earlier_figures_are_shown(name: str, words: str) -> None:
    metrics = upgraded_metrics(json.loads((RECORDS / name / "metrics.json").read_text()))
    assert verdict(metrics).startswith(words)
    assert len(summary_tables(metrics)) >= 3
    assert upgraded_metrics(metrics) == metrics


def test_the_report_shows_an_earlier_run(tmp_path: Path) -> None:
    for file in ("config.json", "metrics.json"):
        (tmp_path / file).write_text((RECORDS / "kl-02" / file).read_text())
    (tmp_path / "training.jsonl").write_text(json.dumps({"step": 1, "constrained": 0.1, "multiplier": 1.0}) + "\n")
    records = load_records(tmp_path)
    assert records.summary()["bound on the KL (nats)"] == "0.2"
    chart = training_charts(records)[0]
    assert chart.title == "The constraint: KL"
    assert chart.series[-1].points == ((1, 0.2), (1, 0.2))
