"""A run evaluated at lengths other than the one it was trained at."""

import json
import sys
from pathlib import Path

import pytest

from gossamer.cli import main
from gossamer.errors import GossamerError
from gossamer.evaluation.evaluate import evaluate_run
from gossamer.evaluation.lengths import add_lengths
from gossamer.measures.language import measure_language
from gossamer.models.pretrained import load_dense
from gossamer.runs.job import post_train
from gossamer.runs.record import Run
from gossamer.runs.settings import RunConfig
from gossamer.training.data import is_held_out, pack
from gossamer.training.documents import read_documents
from gossamer.training.settings import TrainingConfig


@pytest.fixture(scope="module")
def run(saved_llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    training = TrainingConfig(precision="fp32", batch_size=4, checkpoint_every=0, gate_learning_rate=0.1)
    # More held-out text is requested than exists, so all of it is measured.
    config = RunConfig(
        str(saved_llama), str(text), tokens=12 * 64, seq_len=16, validation_tokens=16, held_out_tokens=10**6,
        control=False, training=training,
    )  # fmt: skip
    finished = post_train(config, tmp_path_factory.mktemp("runs") / "run")
    evaluate_run(finished)
    return finished


def test_the_length_of_training_gives_the_figures_of_the_run(run: Run) -> None:
    before = json.loads(run.metrics.read_text())
    after = add_lengths(run, [16, 32, 7])
    assert {key: value for key, value in after.items() if key != "lengths"} == before
    assert json.loads(run.metrics.read_text()) == after
    own, longer, shorter = after["lengths"]
    for key in ("tokens_evaluated", "loss_dense", "loss_sparse", "loss_difference_stderr", "kl", "open_fraction",
                "open_links_per_query"):  # fmt: skip
        assert own[key] == pytest.approx(before[key], rel=1e-5), key
    assert [row["seq_len"] for row in (own, longer, shorter)] == [16, 32, 7]
    assert longer["open_links_per_query"] > own["open_links_per_query"] > shorter["open_links_per_query"] > 0


def test_a_stream_is_measured_on_its_held_out_documents(saved_llama: Path, text: Path, tmp_path: Path) -> None:
    training = TrainingConfig(precision="fp32", checkpoint_every=0)
    config = RunConfig(
        str(saved_llama), str(text), tokens=128, seq_len=16, control=False, stream=True, training=training
    )
    run = post_train(config, tmp_path / "run")
    evaluate_run(run)
    (row,) = add_lengths(run, [16])["lengths"]
    dense, tokenizer = load_dense(str(saved_llama))
    unseen = [document for document in read_documents(text) if is_held_out(document)]
    blocks = pack(unseen, tokenizer, 16, name="text")[1:]  # the first block is for validation
    assert row["tokens_evaluated"] == 15 * len(blocks)
    assert row["loss_dense"] == pytest.approx(measure_language(dense, blocks).loss, rel=1e-5)


def test_every_key_is_documented(run: Run) -> None:
    documented = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    assert [key for key in add_lengths(run, [8])["lengths"][0] if f"`{key}`" not in documented] == []


def test_as_much_text_is_measured_as_asked_for(run: Run) -> None:
    (row,) = add_lengths(run, [16], held_out_tokens=64)["lengths"]
    assert (row["blocks_evaluated"], row["tokens_evaluated"]) == (4, 60)
    (only,) = add_lengths(run, [16], held_out_tokens=16)["lengths"]
    assert (only["blocks_evaluated"], only["loss_difference_stderr"], only["kl_stderr"]) == (1, None, None)


def test_an_amount_of_text_without_lengths_is_refused(run: Run, monkeypatch, capsys) -> None:
    before = run.metrics.read_text()
    monkeypatch.setattr(sys, "argv", ["gossamer", "evaluate", str(run.folder), "--held-out-tokens", "64"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert "--held-out-tokens 64 needs --lengths" in capsys.readouterr().err
    assert run.metrics.read_text() == before


@pytest.mark.parametrize(("lengths", "complaint"), [("8,x", "not a list of numbers"), ("1", "2 tokens or more")])
def test_bad_lengths_are_refused_in_one_line(run: Run, lengths: str, complaint: str, monkeypatch, capsys) -> None:
    before = run.metrics.read_text()
    monkeypatch.setattr(sys, "argv", ["gossamer", "evaluate", str(run.folder), "--lengths", lengths])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert complaint in capsys.readouterr().err
    assert run.metrics.read_text() == before


def test_a_length_over_the_context_is_refused(run: Run) -> None:
    with pytest.raises(GossamerError, match="length 100000 is out of reach"):
        add_lengths(run, [100_000])
