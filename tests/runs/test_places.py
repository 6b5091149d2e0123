"""A run finds its model, its text and its starting run from any working directory."""

import json
import shutil
from pathlib import Path

import pytest

from conftest import sentences
from families import tiny_model
from gossamer import GossamerError
from gossamer.runs.job import post_train
from gossamer.runs.record import Run, load_both
from gossamer.runs.settings import RunConfig
from gossamer.training.settings import TrainingConfig

TRAINING = TrainingConfig(batch_size=2, checkpoint_every=0, precision="fp32")
SIZES = {"tokens": 32, "seq_len": 16, "validation_tokens": 32, "held_out_tokens": 32, "training": TRAINING}


@pytest.fixture
def home(saved_llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a model and a text."""
    home = tmp_path / "home"
    shutil.copytree(saved_llama, home / "models" / "tiny")
    shutil.copy(text, home / "text.jsonl.gz")
    monkeypatch.chdir(home)
    return home


def test_local_paths_are_recorded_in_full(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = post_train(RunConfig("models/tiny", "text.jsonl.gz", **SIZES), "first")
    again = post_train(RunConfig("./models/../models/tiny/", "text.jsonl.gz", start_from="first", **SIZES), "second")
    for run in (first, again):
        config = json.loads((run.folder / "config.json").read_text())["config"]
        assert config["model"] == str(home / "models" / "tiny")
        assert config["text"] == str(home / "text.jsonl.gz")
    assert config["start_from"] == str(home / "first")
    assert json.loads((home / "first" / "model" / "config.json").read_text())["base"] == str(home / "models" / "tiny")
    monkeypatch.chdir("/")
    dense, _, _ = load_both(Run(home / "second"))
    assert dense.config.name_or_path == str(home / "models" / "tiny")


def test_names_stay_as_they_are(home: Path) -> None:
    for name in ("smollm2", "self", "org"):
        (home / name).mkdir()
    (home / "gpt2").touch()
    config = RunConfig("smollm2", "self", start_from="nowhere")
    assert (config.model, config.text, config.start_from) == ("smollm2", "self", "nowhere")
    config = RunConfig("gpt2", "org/text:part")
    assert (config.model, config.text, config.start_from) == ("gpt2", "org/text:part", None)


def test_the_same_places_in_other_words_are_the_same_run(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "link").symlink_to(home / "models")
    post_train(RunConfig("models/tiny", "text.jsonl.gz", control=False, **SIZES), "run")
    # Older versions recorded relative paths.
    record = json.loads((home / "run" / "config.json").read_text())
    record["config"] |= {"model": "models/tiny", "text": "text.jsonl.gz"}
    (home / "run" / "config.json").write_text(json.dumps(record))
    for model, text in (("models/tiny", "text.jsonl.gz"), ("link/tiny", str(home / "text.jsonl.gz"))):
        post_train(RunConfig(model, text, control=False, **SIZES), "run", resume=True)
    other = RunConfig(str(home / "link" / "tiny"), "text.jsonl.gz", control=False, start_from="run", **SIZES)
    post_train(other, "second")
    post_train(
        RunConfig("link/tiny", "text.jsonl.gz", control=False, start_from="./run/", **SIZES), "second", resume=True
    )
    shutil.copytree(home / "models" / "tiny", home / "models" / "copy")
    with pytest.raises(GossamerError, match=r"was begun with model='.*/models/tiny', not '.*/models/copy'"):
        post_train(RunConfig("models/copy", "text.jsonl.gz", control=False, **SIZES), "run", resume=True)


def test_what_is_passed_over_of_a_folder_is_said_when_a_run_begins(home: Path) -> None:
    (home / "text").mkdir()
    (home / "text" / "a.txt").write_text("\n".join(sentences(200)))
    (home / "text" / "._a.txt").write_bytes(b"\x00\xff")
    said: list[str] = []
    config = RunConfig("models/tiny", "text", control=False, **SIZES)
    post_train(config, "run", warn=said.append)
    assert said.count(f"{home / 'text'}; passed over: ._a.txt (hidden)") == 1
    said.clear()
    post_train(config, "run", resume=True, warn=said.append)
    assert not any("passed over" in line for line in said)


def test_a_token_that_the_model_does_not_know_stops_a_run_before_anything_is_written(home: Path, tokenizer) -> None:
    model = tiny_model("llama")
    model.resize_token_embeddings(60)
    model.save_pretrained(home / "models" / "small")
    tokenizer.save_pretrained(home / "models" / "small")
    before = sorted(home.iterdir())
    for options, said in (({}, r"tokenizer has 78 tokens, .* for 60 only"), ({"stream": True}, "may have tokens")):
        with pytest.raises(GossamerError, match=said):
            post_train(RunConfig("models/small", "text.jsonl.gz", control=False, **options, **SIZES), "run")
    assert sorted(home.iterdir()) == before
