"""A run recognises the model and the text that it was started with, from any working directory."""

import gzip
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from conftest import sentences
from families import tiny_model
from gossamer import GossamerError
from gossamer.evaluation.evaluate import evaluate_run
from gossamer.evaluation.lengths import add_lengths
from gossamer.models.fingerprint import weights_fingerprint
from gossamer.runs.job import post_train
from gossamer.runs.record import Run, load_both
from gossamer.runs.settings import RunConfig
from gossamer.training.documents import text_fingerprint
from gossamer.training.settings import TrainingConfig


def config(model: Path | str, text: Path | str, **more: object) -> RunConfig:
    training = TrainingConfig(batch_size=2, checkpoint_every=1, precision="fp32")
    sizes = {"tokens": 2 * 2 * 16, "seq_len": 16, "validation_tokens": 32, "held_out_tokens": 64}
    return RunConfig(str(model), str(text), control=False, training=training, **{**sizes, **more})  # type: ignore[arg-type]


@pytest.fixture
def own_model(saved_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved_llama, tmp_path / "model"))


def write_text(folder: Path, seed: int) -> Path:
    folder.mkdir(exist_ok=True)
    for part in range(2):
        rows = sentences(200, seed + part)
        (folder / f"{part}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return folder


def test_another_model_in_the_place_of_the_runs_own_is_refused(own_model: Path, text: Path, tmp_path: Path) -> None:
    asked = config(own_model, text)
    run = post_train(asked, tmp_path / "run")
    before = evaluate_run(run)
    tiny_model("llama", seed=1).save_pretrained(own_model)
    uses: list[Callable[[], object]] = [
        lambda: evaluate_run(run),
        lambda: load_both(run),
        lambda: add_lengths(run, [8]),
        lambda: post_train(asked, run.folder, resume=True),
        lambda: post_train(config(own_model, text, start_from=str(run.folder)), tmp_path / "second"),
    ]
    for use in uses:
        with pytest.raises(
            GossamerError, match=r"model has other weights than when .*run was begun; put the model back"
        ):
            use()
    assert json.loads(run.metrics.read_text()) == before
    assert not (tmp_path / "second").exists()


def test_a_run_is_evaluated_from_another_folder(
    own_model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = post_train(config("model", os.path.relpath(text)), "run")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    evaluate_run(Run(tmp_path / "run"))
    add_lengths(Run(tmp_path / "run"), [8])
    assert run.folder == Path("run")


def test_another_text_in_the_place_of_a_streams_is_refused(own_model: Path, tmp_path: Path) -> None:
    text = write_text(tmp_path / "text", seed=0)
    asked = config(own_model, text, stream=True, stream_workers=0)
    run = post_train(asked, tmp_path / "run")
    evaluate_run(run)
    write_text(text, seed=7)
    for use in (lambda: post_train(asked, run.folder, resume=True), lambda: add_lengths(run, [8])):
        with pytest.raises(
            GossamerError, match=r"text holds another text than when .*run was begun; put the text back"
        ):
            use()


def test_a_data_set_on_the_hub_is_read_at_the_commit_that_the_run_was_begun_with(
    saved_llama: Path, tmp_path: Path
) -> None:
    """Later pushes have no effect; if the commit no longer exists, a one-line message ends the run."""
    session = Path(__file__).parents[1] / "hub_text_session.py"
    line = [sys.executable, str(session), str(tmp_path), str(saved_llama)]
    result = subprocess.run(line, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["recorded"] == found["first"]
    assert found["the same"]
    assert found["lengths are the same"]
    assert found["later"][0] == found["later"][1] != found["first"]
    for told in (found["resume"], found["lengths"]):
        assert told.startswith(f"org/text on the Hub does not have the commit {found['first'][:12]} any more")
        assert told.endswith("begin anew with another --out")


def test_a_data_set_in_a_folder_that_changed_is_refused(own_model: Path, tmp_path: Path) -> None:
    text = write_text(tmp_path / "text", seed=0)
    asked = config(own_model, f"hub:{text}", stream=True, stream_workers=0)
    run = post_train(asked, tmp_path / "run")
    post_train(asked, run.folder, resume=True)
    write_text(text, seed=7)
    with pytest.raises(GossamerError, match=r"text holds another text than when .*run was begun; put the text back"):
        post_train(asked, run.folder, resume=True)


def test_fingerprints_tell_what_is_there_not_where(text: Path, tmp_path: Path) -> None:
    model = tiny_model("llama")
    known = weights_fingerprint(model)
    assert weights_fingerprint(tiny_model("llama")) == known
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1e-4
    assert weights_fingerprint(model) != known
    copied = tmp_path / "copy.jsonl.gz"
    shutil.copy(text, copied)
    assert text_fingerprint(str(copied)) == text_fingerprint(str(text))
    with gzip.open(copied, "at") as stream:
        stream.write('{"text": "more"}\n')
    assert text_fingerprint(str(copied)) != text_fingerprint(str(text))
    assert text_fingerprint("self") is None
    assert text_fingerprint("org/name") is None


def test_blocks_that_have_changed_are_refused(own_model: Path, text: Path, tmp_path: Path) -> None:
    run = post_train(config(own_model, text), tmp_path / "run")
    file = run.folder / "blocks.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-4] + bytes([whole[-4] ^ 1]) + whole[-3:])
    with pytest.raises(GossamerError, match=r"blocks.safetensors has changed since it was written"):
        evaluate_run(run)
    file.write_bytes(whole[:-4])
    with pytest.raises(GossamerError, match=r"blocks.safetensors cannot be used: cut short"):
        evaluate_run(run)


def test_damage_to_the_run_that_one_starts_from_is_found_before_anything_is_written(
    own_model: Path, text: Path, tmp_path: Path
) -> None:
    start = post_train(replace(config(own_model, text), control=True), tmp_path / "first")
    weights = load_file(start.control / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, start.control / "model.safetensors", {"format": "pt"})
    with pytest.raises(GossamerError, match=r"control is not whole: it lacks model.norm.weight"):
        evaluate_run(start)
    again = replace(config(own_model, text, start_from=str(start.folder)), control=True)
    with pytest.raises(GossamerError, match=r"control is not whole"):
        post_train(again, tmp_path / "second")
    assert not (tmp_path / "second").exists()
