"""Prompts with tokens for which the model has no embedding are refused in one line that gives both sizes."""

import copy
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from families import tiny_model
from gossamer import GossamerError
from gossamer.circuits.attention_record import AttentionPrompt, record_attention
from gossamer.cli import app

SAID = r"'<a19>' \(number 97\); the tokenizer has 98 tokens, the model embeddings for 97 only"


@pytest.fixture
def larger(tokenizer):
    """The tokenizer with one token more than the tiny models have embeddings for."""
    larger = copy.deepcopy(tokenizer)
    larger.add_tokens([f"<a{number}>" for number in range(20)])
    assert len(larger) == 98
    return larger


ROWS = {
    "the prompt": {"clean": "the <a19> model", "answers": [" one"]},
    "an answer": {"clean": "the sparse model", "answers": [" <a19>"]},
    "neither": {"clean": "the sparse model", "answers": [" one"]},
}


@pytest.mark.parametrize("place", ROWS)
@pytest.mark.parametrize("verb", ["task", "evaluate-circuit"])
def test_tasks_name_the_token(verb: str, place: str, larger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    larger.save_pretrained(tmp_path / "model")
    row = {"corrupted": "the link model", "wrong": [" two"], **ROWS[place]}
    (tmp_path / "own.jsonl").write_text(json.dumps(row) + "\n")
    line = [verb, tmp_path / "own.jsonl", "--model", tmp_path / "model", "--examples", 1]
    if verb == "evaluate-circuit":
        write_circuit_of_everything(tmp_path / "circuit.json")
        line = [verb, tmp_path / "circuit.json", "--task", *line[1:], "--force"]
    result = CliRunner().invoke(app, list(map(str, line)))
    if place == "neither":
        assert result.exit_code == 0, result.exception
    else:
        assert isinstance(result.exception, GossamerError)
        with pytest.raises(GossamerError, match=SAID):
            raise result.exception


def write_circuit_of_everything(file: Path) -> None:
    from gossamer.circuits.circuit_files import Circuit, write_circuit
    from gossamer.circuits.graph import Graph

    graph = Graph(3, 4, False)
    kept = graph.possible()
    write_circuit(file, Circuit(graph, 32, kept.float(), kept))


def test_a_prompt_to_look_at_names_the_token(larger) -> None:
    models = {"dense": tiny_model("llama")}
    ids = tuple(larger("the <a19> model")["input_ids"])
    with pytest.raises(GossamerError, match=f"the prompt has the token {SAID}"):
        record_attention(models, larger, [AttentionPrompt(ids, "")])
    record_attention(models, larger, [AttentionPrompt(ids[:1], "")])
