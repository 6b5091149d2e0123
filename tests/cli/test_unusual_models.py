"""Commands in this process, on runs with unusual models and tokenizers."""

import io
import json
import re
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest
import typer
from transformers import AutoConfig, AutoModelForCausalLM, ByT5Tokenizer, PreTrainedTokenizerFast

from conftest import sentences
from families import CONFIGS
from gossamer.circuits.tables import comparison_tables
from gossamer.cli import app, main
from gossamer.cli.common import console
from gossamer.errors import GossamerError
from gossamer.evaluation.evaluate import evaluate_run
from gossamer.runs.job import post_train
from gossamer.runs.settings import RunConfig
from gossamer.training.settings import TrainingConfig
from settings_files import config
from tiny_task import TINY_TASK


def call(*arguments: object) -> None:
    app([str(argument) for argument in arguments], standalone_mode=False)


def trained(model: Path, text: Path, out: Path) -> Path:
    """Train a run of two steps."""
    training = TrainingConfig(batch_size=2, checkpoint_every=0, precision="fp32")
    sizes = {"tokens": 2 * 2 * 16, "seq_len": 16, "validation_tokens": 32, "held_out_tokens": 64}
    run = post_train(RunConfig(str(model), str(text), control=False, training=training, **sizes), out)
    evaluate_run(run)
    return run.folder


@pytest.fixture(scope="module")
def run(saved_llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(saved_llama, text, tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def run_of_bytes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a byte-level model; its tokenizer has no fast version and appends ``</s>`` to every text."""
    folder = tmp_path_factory.mktemp("bytes")
    family, settings = CONFIGS["llama"]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**settings, "vocab_size": 259}))
    model.save_pretrained(folder / "model")
    ByT5Tokenizer(extra_ids=0).save_pretrained(folder / "model")
    (folder / "text.txt").write_text("\n".join(sentences(200)))
    return trained(folder / "model", folder / "text.txt", folder / "run")


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


def test_a_tokenizer_that_the_harness_cannot_use_is_refused_before_anything_is_measured(
    run_of_bytes: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval")
    shutil.copytree(run_of_bytes, tmp_path / "run")
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    bare.save_pretrained(tmp_path / "run" / "model")
    (tmp_path / "run" / "metrics.json").unlink()
    (tmp_path / "tiny.yaml").write_text(TINY_TASK)
    (tmp_path / "tiny.jsonl").write_text(json.dumps({"prompt": "the", "choices": [" one", " two"], "answer": 0}))
    line = ("--tasks", "tiny", "--task-path", tmp_path)
    with pytest.raises(GossamerError, match="begins or ends a text, and this tokenizer has none"):
        call("evaluate", tmp_path / "run", *line)
    assert not (tmp_path / "run" / "metrics.json").exists()
    call("evaluate", run_of_bytes, *line)  # a tokenizer without a fast version works here
    figures = json.loads((run_of_bytes / "metrics.json").read_text())["tasks"]["tiny"]
    assert set(figures["models"]) == {"dense", "sparse"}


@pytest.mark.parametrize(
    "option", [("--task-path", "tasks"), ("--num-fewshot", 1), ("--limit", 2), ("--allow-task-code",)]
)
def test_options_of_tasks_without_tasks_are_refused(option: tuple[object, ...], run: Path) -> None:
    before = (run / "metrics.json").read_bytes()
    with pytest.raises(GossamerError, match=f"{option[0]} says how to measure tasks; name them by --tasks"):
        call("evaluate", run, *option)
    assert (run / "metrics.json").read_bytes() == before


def task_file(file: Path, answer: str = "two", metric: str = "logit_difference") -> Path:
    """Write a task file that the tiny tokenizer can encode."""
    rows = [
        {"clean": f"the {word} reads", "corrupted": f"a {word} reads", "answers": [f" {answer}"], "wrong": [" one"]}
        for word in ("sparse", "model")
    ]
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps({**row, "metric": metric}) + "\n" for row in rows))
    return file


def test_records_of_task_files_with_one_name_are_told_apart(run: Path, tmp_path: Path) -> None:
    """The prompts are the same, but the answers or the metric differ."""
    line = ("circuits", run, "--examples", 2, "--score", "eap", "--levels", "edges", "--force", "--task")
    first = task_file(tmp_path / "first" / "own.jsonl")
    call(*line, first)
    record = (run / "circuits" / "own" / "circuits.json").read_text()
    call(*line, first)  # circuits of the same file may replace the record
    out = ("--edges", 5, "--out", tmp_path / "circuit.json")
    call("export", run, "--task", first, *out)
    for answer, metric in (("four", "logit_difference"), ("two", "probability_difference")):
        second = task_file(tmp_path / "second" / "own.jsonl", answer, metric)
        with pytest.raises(GossamerError, match=r"circuits/own holds circuits found in another file.*--replace"):
            call(*line, second)
        with pytest.raises(GossamerError, match=r"holds circuits found in another file.*find those of own with"):
            call("export", run, "--task", second, *out)
    models = json.loads(record)["models"]
    kept = json.loads((run / "circuits" / "own" / "circuits.json").read_text())["models"]
    assert kept["sparse"]["levels"] == models["sparse"]["levels"]
    call(*line, second, "--replace")
    call("export", run, "--task", second, *out)


def test_a_task_file_never_stands_for_another_task(run: Path, tmp_path: Path) -> None:
    """It is not mistaken for the built-in task of the same name or for a task's record under another ablation."""
    line = ("circuits", run, "--examples", 2, "--score", "eap", "--levels", "edges", "--force", "--task")
    before = set((run / "circuits").glob("*")) if (run / "circuits").exists() else set()
    out = ("--edges", 5, "--out", tmp_path / "circuit.json")
    for name in ("ioi", "IOI-zero", "other-mean"):
        call(*line, task_file(tmp_path / f"{name}.jsonl"))
        call("export", run, "--task", tmp_path / f"{name}.jsonl", *out)
    found = {path.name for path in set((run / "circuits").glob("*")) - before}
    assert found == {"ioi.jsonl", "IOI-zero.jsonl", "other-mean.jsonl"}
    with pytest.raises(GossamerError, match="has no circuits of ioi;"):
        call("export", run, "--task", "ioi", *out)
    # Names that older versions gave to records of files.
    for record, options in (("ioi", ()), ("ioi-zero", ("--ablation", "zero"))):
        shutil.copytree(run / "circuits" / "ioi.jsonl", run / "circuits" / record)
        with pytest.raises(GossamerError, match=rf"{record} holds circuits found with task ioi\.jsonl, not ioi; find"):
            call("export", run, "--task", "ioi", *options, *out)


def test_a_file_of_scores_alone_is_measured_when_it_is_said_how_many(run: Path, tmp_path: Path, capsys) -> None:
    own = task_file(tmp_path / "scored.jsonl")
    line = ("--task", own, "--examples", 2, "--force")
    call("circuits", run, *line, "--score", "eap", "--levels", "edges")
    for suffix in (".json", ".graphml"):
        call("export", run, "--task", own, "--edges", 30, "--out", tmp_path / f"circuit{suffix}")
    content = json.loads((tmp_path / "circuit.json").read_text())
    kept = sum(edge["in_graph"] for edge in content["edges"].values())
    assert 0 < kept <= 30
    evaluation = ("evaluate-circuit", tmp_path / "scores.json", "--model", run, *line)
    for edge in content["edges"].values():
        edge["in_graph"] = False
    (tmp_path / "scores.json").write_text(json.dumps(content))
    with pytest.raises(GossamerError, match=r"scores\.json keeps no edge: it holds scores alone; .*by --edges$"):
        call(*evaluation)
    with pytest.raises(GossamerError, match=r"scores\.json has scores of edges, none of nodes to choose 3 by"):
        call(*evaluation, "--nodes", 3)
    with pytest.raises(GossamerError, match="give one of them"):
        call(*evaluation, "--nodes", 3, "--edges", 3)
    with pytest.raises(GossamerError, match="--signed says how to choose"):
        call(*evaluation, "--signed")
    capsys.readouterr()
    call("evaluate-circuit", tmp_path / "circuit.json", "--model", run, *line)
    wanted = re.findall(r"faithfulness.*|mean.*", capsys.readouterr().out)
    call(*evaluation, "--edges", 30)
    shown = capsys.readouterr().out
    assert re.findall(r"faithfulness.*|mean.*", shown) == wanted
    assert re.search(rf"edges\s+│\s+{kept} of {len(content['edges'])}\s", shown)
    assert ("cut off" in shown) == (kept < 30)
    with pytest.raises(GossamerError, match=rf"circuit\.graphml holds {kept} edges and nothing of others; --edges 40"):
        call("evaluate-circuit", tmp_path / "circuit.graphml", "--model", run, *line, "--edges", 40)
    for edge in content["edges"].values():
        del edge["score"]
    (tmp_path / "scores.json").write_text(json.dumps(content))
    with pytest.raises(GossamerError, match=r"scores\.json keeps no edge: nor has it scores"):
        call(*evaluation)


def test_neurons_of_a_file_count(run: Path, tmp_path: Path, capsys) -> None:
    """A circuit of all edges and one neuron of each node."""
    own = task_file(tmp_path / "neurons.jsonl")
    line = ("--task", own, "--examples", 2, "--force")
    call("circuits", run, *line, "--score", "eap", "--levels", "edges")
    call("export", run, "--task", own, "--edges", 10_000, "--out", tmp_path / "circuit.json")
    content = json.loads((tmp_path / "circuit.json").read_text())
    sources = [node for name, node in content["nodes"].items() if name != "logits"]
    for node in sources:
        node["neurons"] = [True, *[False] * 31]
    evaluation = ("evaluate-circuit", tmp_path / "circuit.json", "--model", run, *line)
    capsys.readouterr()
    shown = []
    for _ in range(2):
        call(*evaluation)
        shown.append(capsys.readouterr().out)
        (tmp_path / "circuit.json").write_text(json.dumps(content))
    assert re.search(r"faithfulness\s+│\s+1\.000", shown[0])
    assert not re.search(r"faithfulness\s+│\s+1\.000", shown[1])
    assert re.search(rf"neurons\s+│\s+{len(sources)} of {32 * len(sources)}\s", shown[1])
    assert "EAP-IG" not in shown[1].replace("circuit.json", "")
    content["edges"]["input->logits"]["in_graph"] = False
    (tmp_path / "circuit.json").write_text(json.dumps(content))
    call(*evaluation)
    assert "faithfulness in EAP-IG" in capsys.readouterr().out


@pytest.mark.parametrize("width", [50, 30])
def test_commands_cut_no_number_in_a_narrow_terminal(
    width: int, run: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    own = task_file(tmp_path / "narrow.jsonl")
    call("circuits", run, "--task", own, "--examples", 2, "--force", "--seeds", 2, "--replace")
    record = json.loads((run / "circuits" / "narrow" / "circuits.json").read_text())
    capsys.readouterr()
    shown = {}
    for columns in (300, width):
        monkeypatch.setattr(console, "width", columns)
        call("inspect", run)
        call("inspect", run / "model")
        call("task", own, "--model", run, "--examples", 2)
        call("evaluate", run, "--lengths", "8,16")
        call("plan", "smollm2")
        for table in comparison_tables(record):
            console.print(table)
        shown[columns] = capsys.readouterr().out
    assert "…" not in shown[width]
    wide, narrow = (Counter(re.findall(r"(?<!\S)[-+]?\d[\d.,]*(?!\S)", text)) for text in shown.values())
    assert len(wide) > 50
    assert not wide - narrow, wide - narrow


def output(encoding: str, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> tuple[str, object]:
    """Run the command line with output streams of an encoding; return its output and exit code."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["gossamer", *map(str, arguments)])
        patch.setattr(sys, "stdout", stream)
        patch.setattr(sys, "stderr", stream)
        try:
            main()
            code: object = 0
        except SystemExit as stopped:
            code = stopped.code
    return stream.buffer.getvalue().decode(encoding, errors="strict"), code


def test_help_shows_every_default_that_it_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """rich takes text in brackets for a style and does not show it."""
    monkeypatch.setenv("COLUMNS", "200")
    named = 0
    for name, command in typer.main.get_command(app).commands.items():
        shown = " ".join(output("utf-8", monkeypatch, name, "--help")[0].split())
        for parameter in command.params:
            default = getattr(parameter, "show_default", None)
            named += isinstance(default, str)
            assert not isinstance(default, str) or f"[default: ({default})]" in shown, (name, parameter.name)
            assert not re.search(r"(?<!\\)\[[a-z]", getattr(parameter, "help", None) or ""), (name, parameter.name)
    assert named > 10


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "cp437", "utf-8"])
def test_output_that_does_not_hold_every_character(encoding: str, run: Path, tmp_path: Path, monkeypatch) -> None:
    for verb in ((), ("sparsify",), ("circuits",), ("plan",)):
        text, code = output(encoding, monkeypatch, *verb, "--help")
        assert code == 0
        assert "Usage" in text
    text, code = output(encoding, monkeypatch, "inspect", run)
    assert code == 0
    assert re.search({"ascii": r"\d \+- \d"}.get(encoding, "\\d ± \\d"), text)
    # A name that is not UTF-8, and one with characters that few encodings have.
    for name in ("run\udcff", "τ漢"):
        text, code = output(encoding, monkeypatch, "inspect", tmp_path / name)
        assert code == 2
        assert "gossamer: " in text
        assert ("is not UTF-8; give a name that is" in text) == ("\udcff" in name)
        assert len(text.strip().splitlines()) == 1


def test_training_shows_its_bound_in_plain_characters(
    saved_llama: Path, text: Path, tmp_path: Path, monkeypatch
) -> None:
    line = ("--tokens", 128, "--seq-len", 16, "--no-control", *config(held_out_tokens=64, precision="fp32"))
    said, code = output("ascii", monkeypatch, "sparsify", saved_llama, "--text", text, "--out", tmp_path / "run", *line)
    assert code == 0
    assert re.search(r"tau \d+\.\d+  lambda \d", said)
