"""Commands in this process, on runs of models and tokenizers that are not the usual ones."""

import json
import re
import shutil
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, ByT5Tokenizer, PreTrainedTokenizerFast

from conftest import sentences
from families import CONFIGS
from gossamer.cli import app
from gossamer.errors import GossamerError
from gossamer.evaluation.evaluate import evaluate_run
from gossamer.training.run import RunConfig, post_train
from gossamer.training.trainer import TrainingConfig


def call(*arguments: object) -> None:
    app([str(argument) for argument in arguments], standalone_mode=False)


@pytest.fixture(scope="module")
def run_of_bytes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a model over bytes: its tokenizer has no fast form, and ends every text with ``</s>``."""
    folder = tmp_path_factory.mktemp("bytes")
    family, settings = CONFIGS["llama"]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**settings, "vocab_size": 259}))
    model.save_pretrained(folder / "model")
    ByT5Tokenizer(extra_ids=0).save_pretrained(folder / "model")
    (folder / "text.txt").write_text("\n".join(sentences(200)))
    training = TrainingConfig(steps=2, batch_size=2, checkpoint_every=0, precision="fp32")
    config = RunConfig(
        str(folder / "model"), str(folder / "text.txt"), seq_len=16, validation_tokens=32, held_out_tokens=64,
        control=False, training=training,
    )  # fmt: skip
    run = post_train(config, folder / "run")
    evaluate_run(run)
    return run.folder


def test_a_task_for_a_tokenizer_without_a_fast_form(run_of_bytes: Path, tmp_path: Path, capsys) -> None:
    row = {"clean": "ab", "corrupted": "cb", "answers": ["d"], "wrong": ["e"]}
    (tmp_path / "own.jsonl").write_text(json.dumps(row))
    for model in (run_of_bytes, run_of_bytes / "model"):
        call("task", tmp_path / "own.jsonl", "--model", model, "--examples", 1)
        assert "dropped" not in capsys.readouterr().out


def test_view_shows_no_ending_token(run_of_bytes: Path, tmp_path: Path) -> None:
    call("view", run_of_bytes, "abc", "--out", tmp_path / "view.html")
    page = (tmp_path / "view.html").read_text(encoding="utf-8")
    assert re.findall(r'"tokens":(\[.*?\])', page) == ['["a","b","c"]']


TASK = """
task: tiny
dataset_path: json
dataset_kwargs: {data_files: {test: tiny.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{prompt}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
"""


def test_a_tokenizer_that_the_harness_cannot_use_is_refused_before_anything_is_measured(
    run_of_bytes: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval")
    shutil.copytree(run_of_bytes, tmp_path / "run")
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    bare.save_pretrained(tmp_path / "run" / "model")
    (tmp_path / "run" / "metrics.json").unlink()
    (tmp_path / "tiny.yaml").write_text(TASK)
    (tmp_path / "tiny.jsonl").write_text(json.dumps({"prompt": "the", "choices": [" one", " two"], "answer": 0}))
    line = ("--tasks", "tiny", "--task-path", tmp_path)
    with pytest.raises(GossamerError, match="begins or ends a text, and this tokenizer has none"):
        call("evaluate", tmp_path / "run", *line)
    assert not (tmp_path / "run" / "metrics.json").exists()
    call("evaluate", run_of_bytes, *line)  # a tokenizer without a fast form will do
    figures = json.loads((run_of_bytes / "metrics.json").read_text())["tasks"]["tiny"]
    assert set(figures["models"]) == {"dense", "sparse"}
