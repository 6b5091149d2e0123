"""Damaged files, odd options and mismatched inputs end with exit code 0 or 2, and leave no partial files."""

import io
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

import fuzz
from conftest import sentences
from families import tiny_model
from gossamer.circuits.circuit_files import Circuit, write_circuit
from gossamer.circuits.compare import compare_circuits
from gossamer.circuits.config import SearchConfig
from gossamer.circuits.records import load_circuit
from gossamer.circuits.tasks import find_task
from gossamer.cli import main
from gossamer.evaluation.evaluate import evaluate_run
from gossamer.runs.job import post_train
from gossamer.runs.settings import RunConfig
from gossamer.training.settings import TrainingConfig
from tiny_task import TINY_TASK

CASES = 500
QUICK = 24
CHUNK = 25

SETTINGS = """
batch_size: 2
held_out_tokens: 64
validation_tokens: 32
tokens: 128
precision: fp32
checkpoint_every: 1
stream_workers: 0
lora_rank: 2
"""


class _Stops(Console):
    """A console that interrupts the training at the n-th call of print."""

    def __init__(self, after: int) -> None:
        super().__init__(file=io.StringIO())
        self.after = after

    def print(self, *_: object, **__: object) -> None:
        self.after -= 1
        if not self.after:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def world(saved_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, texts, a run with all records, an interrupted run, adapters, circuits and a checkpoint."""
    world = tmp_path_factory.mktemp("world")
    before = Path.cwd()
    os.chdir(world)
    try:
        _make_world(saved_llama, world)
    finally:
        os.chdir(before)
    return world


def _make_world(saved_llama: Path, world: Path) -> None:
    shutil.copytree(saved_llama, world / "model")
    tiny_model("llama", seed=1).save_pretrained(world / "other")
    rows = [json.dumps({"text": row}) + "\n" for row in sentences(200)]
    (world / "text.jsonl").write_text("".join(rows))
    (world / "texts").mkdir()
    for part in range(2):
        (world / "texts" / f"{part}.jsonl").write_text("".join(rows[part::2]))
    (world / "settings.yaml").write_text(SETTINGS)
    examples = [
        {"clean": f"the {word} reads", "corrupted": f"a {word} reads", "answers": [" two"], "wrong": [" one"]}
        for word in ("sparse", "model", "row")
    ]
    (world / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in examples))
    (world / "tasks").mkdir()
    (world / "tasks" / "tiny.yaml").write_text(TINY_TASK)
    rows = [{"prompt": f"the {word}", "choices": ["one", "two"], "answer": 0} for word in ("sparse", "model")]
    (world / "tasks" / "tiny.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    training = TrainingConfig(batch_size=2, checkpoint_every=1, precision="fp32")
    sizes = {"tokens": 128, "seq_len": 16, "validation_tokens": 32, "held_out_tokens": 64}
    config = RunConfig("model", "text.jsonl", training=training, lora_rank=2, stream_workers=0, **sizes)
    run = post_train(config, "run")
    evaluate_run(run)
    task = find_task("own.jsonl")
    compare_circuits(run, task, SearchConfig(examples=2, score="eap", force=True))
    with pytest.raises(SystemExit):
        _call("report", "run", "--tokens", "8")
    circuit = load_circuit(run.folder, task, "sparse", 9)
    for name in ("circuit.json", "circuit.graphml"):
        write_circuit(world / name, circuit)
    write_circuit(world / "scores.pt", Circuit(circuit.graph, circuit.width, circuit.scores, circuit.kept & False))
    (run.folder / "report.html").unlink()
    with pytest.raises(KeyboardInterrupt):
        post_train(config, "begun", console=_Stops(3))
    lora = replace(config, training=replace(training, train="lora"), control=False)
    shutil.move(post_train(lora, "lora").adapter, world / "adapter")
    shutil.rmtree(world / "lora")
    model = tiny_model("gpt2")
    linear = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    tensors = {name: t.T.contiguous() if name.endswith(linear) else t for name, t in model.state_dict().items()}
    torch.save({"model": tensors, "model_args": {"n_head": 4}}, world / "checkpoint.pt")


def _call(*line: str) -> None:
    before = sys.argv
    sys.argv = ["gossamer", *line]
    try:
        main()
    finally:
        sys.argv = before


def copy_world(world: Path, folder: Path) -> None:
    """Copy the world; paths in its records are changed to those of the copy."""
    shutil.copytree(world, folder)
    for name in ("run/config.json", "begun/config.json", "adapter/adapter_config.json"):
        (folder / name).write_text((folder / name).read_text().replace(str(world), str(folder)))


def wrong_with(seed: int, world: Path, folder: Path) -> list[str]:
    """List the faults in how the case of a seed ends."""
    copy_world(world, folder)
    case = fuzz.make_case(seed, folder)
    before = fuzz.snapshot(folder)
    end = fuzz.run_case(case, folder)
    found = fuzz.faults(case, end, before, folder)
    shutil.rmtree(folder)
    return [f"{case}: {fault}" for fault in found]


def check_seeds(seeds: range, world: Path, folder: Path) -> None:
    found = [fault for seed in seeds for fault in wrong_with(seed, world, folder / str(seed))]
    assert not found, "\n".join(found)


@pytest.mark.slow
def test_every_command_ends_well_on_what_is_whole(world: Path, tmp_path: Path) -> None:
    """Otherwise the cases below test nothing: a command that always fails also fails on damaged files."""
    folder = tmp_path / "world"
    copy_world(world, folder)
    for _, command in fuzz.COMMANDS:
        case = fuzz.Case(0, command.split())
        end = fuzz.run_case(case, folder)
        exists = "--out run " in command
        assert end.code == (2 if exists else 0), f"{command}: {end.code} {end.errors}"
        shutil.rmtree(folder / "new", ignore_errors=True)


def test_some_cases(world: Path, tmp_path: Path) -> None:
    check_seeds(range(QUICK), world, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, int(os.environ.get("GOSSAMER_FUZZ_CASES", CASES)), CHUNK))
def test_many_cases(first: int, world: Path, tmp_path: Path) -> None:
    check_seeds(range(first, first + CHUNK), world, tmp_path)
