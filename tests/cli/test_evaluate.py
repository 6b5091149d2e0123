"""gossamer evaluate and gossamer inspect."""

import json
from pathlib import Path

import pytest

from command_line import assert_refused, gossamer_command
from tiny_task import TINY_TASK


def test_evaluate_and_inspect_repeat_the_figures(copied: Path) -> None:
    out = copied
    before = json.loads((out / "metrics.json").read_text())
    result = gossamer_command("evaluate", out)
    assert result.returncode == 0, result.stderr
    after = json.loads((out / "metrics.json").read_text())
    assert after == before
    for target, word in ((out, "Constraint"), (out / "model", "gate bias")):
        shown = gossamer_command("inspect", target)
        assert shown.returncode == 0
        assert word in shown.stdout


def test_evaluate_adds_tasks_to_the_figures(copied: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    out = copied
    (tmp_path / "tiny.yaml").write_text(TINY_TASK)
    rows = [{"prompt": f"the {word}", "choices": ["one", "two"], "answer": 0} for word in ("sparse", "model", "row")]
    (tmp_path / "tiny.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = json.loads((out / "metrics.json").read_text())
    arguments = ("evaluate", out, "--task-path", tmp_path, "--tasks")
    assert_refused(
        gossamer_command("evaluate", out, "--task-path", tmp_path / "none", "--tasks", "tiny"), "none is not"
    )
    assert json.loads((out / "metrics.json").read_text()) == before
    result = gossamer_command(*arguments, "tiny")
    assert result.returncode == 0, result.stderr
    after = json.loads((out / "metrics.json").read_text())
    record = after.pop("tasks")["tiny"]
    assert after == before
    assert set(record["models"]) == {"dense", "sparse", "control"}
    assert record["examples"] == 3
    value = record["models"]["sparse"]["acc"]["value"]
    assert 3 * value == pytest.approx(round(3 * value))
    assert f"{value:.4f} ±" in result.stdout
    shown = gossamer_command("inspect", out)
    assert "tiny" in shown.stdout
    again = gossamer_command("evaluate", out)
    assert again.returncode == 0
    assert json.loads((out / "metrics.json").read_text())["tasks"]["tiny"] == record
