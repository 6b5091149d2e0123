"""Records, figures and the commands that draw them, on the files of tiny runs."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from gossamer.circuits.compare import compare_circuits
from gossamer.circuits.config import SearchConfig
from gossamer.circuits.records import load_circuit
from gossamer.circuits.tables import comparison_tables
from gossamer.circuits.tasks import TASKS
from gossamer.cli import main
from gossamer.demo.demonstrate import DemoConfig, demonstrate
from gossamer.errors import GossamerError
from gossamer.report.plots import all_figures, attention_weights, circuit_figure, heads_figure
from gossamer.report.records import load_records
from gossamer.report.series import faithfulness_charts, loss_chart, training_charts
from gossamer.runs.record import Run
from gossamer.training.settings import TrainingConfig


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short demo run with circuits."""
    folder = tmp_path_factory.mktemp("runs") / "short"
    training = TrainingConfig(
        batch_size=16,
        prompt_tokens=6,
        precision="fp32",
        checkpoint_every=0,
        learning_rate=1e-3,
        gate_learning_rate=1e-3,
    )
    config = DemoConfig(
        width=16,
        layers=2,
        heads=2,
        dense=training,
        dense_steps=6,
        sparse=training,
        sparse_steps=6,
        validation=20,
        held_out=40,
        circuit_prompts=0,
    )
    demonstrate(folder, config)
    compare_circuits(Run(folder), TASKS["addition"], SearchConfig(examples=6, force=True))
    return folder


def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *arguments: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["gossamer", *map(str, arguments)])
    code = 0
    try:
        main()
    except SystemExit as stopped:
        code = int(stopped.code or 0)
    return code, *capsys.readouterr()


def test_series_are_the_records_numbers(run: Path) -> None:
    records = load_records(run)
    assert records.metrics is not None
    constraint, links, multiplier = training_charts(records)
    assert [point[0] for point in multiplier.series[0].points] == [1, 2, 3, 4, 5, 6]
    assert links.series[0].points[-1][1] == records.training[-1]["open_fraction"]
    assert constraint.series[-1].points[0][1] == records.metrics["tau"]
    series = {one.name: one.points for one in loss_chart(records.metrics).series}
    assert series["sparse"] == ((records.metrics["open_fraction"], records.metrics["loss_sparse"]),)
    assert len(series["dense, top-k"]) + len(series["dense, top-k renormalised"]) == len(records.metrics["topk"]) + 2
    assert series["dense, top-k"][-1] == (1.0, records.metrics["topk_loss_dense"])
    task = records.tasks["addition"]
    charts = faithfulness_charts(task.circuits)
    points = task.circuits["models"]["sparse"]["levels"]["edges"]["points"]
    assert charts[1].series[1].points == tuple((point["size"], point["faithfulness"]) for point in points)


def test_every_figure_is_drawn(run: Path, tmp_path: Path) -> None:
    records = load_records(run)
    figures = dict(all_figures(records))
    assert {"training_constraint", "loss", "heads", "attention_0", "circuit_addition"} <= set(figures)
    assert {f"faithfulness_addition_{level}" for level in ("nodes", "edges", "links")} <= set(figures)
    assert records.metrics is not None
    drawn = heads_figure(records.metrics).axes[0].images[0].get_array()
    assert np.allclose(drawn.filled(0), records.metrics["open_fraction_per_head"])
    links = records.tasks["addition"].links
    assert links is not None
    axes = circuit_figure(links, 2).axes
    assert [len(part.lines) for part in axes] == [len(model["links"]) for model in links["models"].values()]
    attention = records.attention
    assert attention is not None
    panels = figures["attention_0"].axes
    assert [panel.get_title() for panel in panels] == list(attention["prompts"][0]["models"])
    for panel in panels:
        weights = attention_weights(attention, 0, panel.get_title())
        layers, heads, tokens, _ = weights.shape
        picture = panel.images[0].get_array().filled(np.nan)
        tiles = picture.reshape(layers, len(picture) // layers, heads, -1).transpose(0, 2, 1, 3)
        margin = (tiles.shape[2] - tokens) // 2
        assert np.array_equal(tiles[..., margin:-margin, margin:-margin], weights)
        assert np.isnan(tiles).sum() == tiles.size - weights.size
    figures["loss"].savefig(tmp_path / "loss.svg")
    assert (tmp_path / "loss.svg").stat().st_size > 1000


def test_the_commands_write_pages_and_figures(run: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    code, said, _ = command(
        monkeypatch, capsys, "report", run, "--out", tmp_path / "p.html", "--figures", tmp_path / "f"
    )
    assert (code, said.strip()) == (0, str(tmp_path / "p.html"))
    assert "</html>" in (tmp_path / "p.html").read_text()
    names = {file.name for file in (tmp_path / "f").iterdir()}
    figures = dict(all_figures(load_records(run)))
    assert names == {f"{name}.{kind}" for name in figures for kind in ("png", "svg")}
    before = {file: file.stat().st_mtime for file in run.rglob("*")}
    code, _, _ = command(monkeypatch, capsys, "view", run, "12+34=", "--out", tmp_path / "v.html")
    assert code == 0
    assert '"note":"your prompt"' in (tmp_path / "v.html").read_text()
    assert {file: file.stat().st_mtime for file in run.rglob("*")} == before


def test_a_record_has_the_links_inside_its_circuits(run: Path) -> None:
    record = json.loads((run / "circuits" / "addition" / "circuits.json").read_text())
    assert all(model["circuit"]["nodes"]["links_inside"] >= 0 for model in record["models"].values())
    for name, links in (("dense", 90.0), ("sparse", 4.5)):
        record["models"][name]["circuit"]["nodes"]["links_inside"] = links
    assert "dense : sparse = 20.0" in comparison_tables(record)[-1].caption


def test_circuits_of_another_corruption_have_a_folder_of_their_own(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    before = (copy / "circuits" / "addition" / "circuits.json").read_text()
    config = SearchConfig(examples=6, score="eap", force=True, corruption="carry", levels=("edges",))
    record = compare_circuits(Run(copy), TASKS["addition"], config)
    assert (copy / "circuits" / "addition" / "circuits.json").read_text() == before
    assert json.loads((copy / "circuits" / "addition-carry" / "circuits.json").read_text()) == record
    found = load_circuit(copy, TASKS["addition"], "dense", 5, corruption="carry")
    other = load_circuit(copy, TASKS["addition"], "dense", 5)
    assert not torch.equal(found.scores, other.scores)
    with pytest.raises(GossamerError, match="has no circuits of addition-carry-zero"):
        load_circuit(copy, TASKS["addition"], "dense", 5, corruption="carry", ablation="zero")
    with pytest.raises(GossamerError, match=r"found with score eap, not exact; --replace"):
        compare_circuits(Run(copy), TASKS["addition"], replace(config, score="exact"))


def test_a_page_takes_only_so_many_links(run: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("gossamer.circuits.attention_record.MOST_LINKS", 2 * 2 * 21)
    assert command(monkeypatch, capsys, "view", run, "12+34=")[0] == 0
    code, _, said = command(monkeypatch, capsys, "view", run, "12+34=0")
    assert code == 2
    assert "prompts of 7 tokens have 112 links, more than the 84" in said


def test_what_cannot_be_shown_is_refused_in_one_line(run: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    def refused(*arguments: object) -> str:
        code, _, errors = command(monkeypatch, capsys, *arguments)
        assert code == 2
        assert len(errors.strip().splitlines()) == 1
        return errors

    assert "is not a run" in refused("report", tmp_path)
    assert "is not a run" in refused("view", tmp_path / "missing", "text")
    assert "prompt is empty" in refused("view", run, "")
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / "training.jsonl").write_text('{"step": 1}\n{"step": \n{"step": 2')
    assert "training.jsonl, line 2 cannot be used: not valid JSON" in refused(
        "report", copy, "--out", tmp_path / "no.html"
    )
    (copy / "training.jsonl").write_text('{"step": 1, "multiplier": NaN}\n{"step": 2')
    assert "training.jsonl, line 1 cannot be used: NaN" in refused("report", copy, "--out", tmp_path / "no.html")
    (copy / "training.jsonl").unlink()
    (copy / "findings.json").write_text("{")
    assert "findings.json cannot be used: not valid JSON" in refused("report", copy, "--out", tmp_path / "no.html")
    assert not (tmp_path / "no.html").exists()


def test_records_in_a_notebook_show_escaped_figures(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "<i>"
    shutil.copytree(run, folder)
    records = load_records(folder)
    shown = records._repr_html_()
    assert "&lt;i&gt;" in shown
    assert "<i>" not in shown
    assert f"<td>{records.metrics['open_fraction']:.4g}</td>" in shown
    assert "open fraction=" in repr(records)
    with pytest.raises(GossamerError, match="is not a run"):
        load_records(tmp_path / "nowhere")
