"""gossamer compare: a sparse model and the dense model it was made from, on a text and on tasks."""

import gzip
import json
import random
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import gossamer
from conftest import WORDS
from families import tiny_model
from gossamer.cli import app
from gossamer.errors import GossamerError
from gossamer.evaluation.capability import TasksConfig, measure_tasks
from gossamer.measures.losses import cross_entropy, kl_divergence
from gossamer.models.lora import add_adapters
from gossamer.models.pretrained import load_dense
from tiny_task import TINY_TASK


def call(*arguments: object) -> None:
    app([str(argument) for argument in arguments], standalone_mode=False)


@pytest.fixture
def page(text: Path, tmp_path: Path) -> Path:
    with gzip.open(text, "rt", encoding="utf-8") as lines:
        words = " ".join(json.loads(line)["text"] for line in list(lines)[:40])
    (tmp_path / "page.txt").write_text(words)
    return tmp_path / "page.txt"


@pytest.fixture
def adapter(saved_llama: Path, tmp_path: Path) -> Path:
    model = gossamer.add_gates(load_dense(str(saved_llama))[0], gate_bias=0.5)
    model.name_or_path = str(saved_llama)
    add_adapters(model, rank=2, alpha=4, seed=3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    gossamer.save_adapter(model, tmp_path / "adapter", dtype=torch.bfloat16)
    return tmp_path / "adapter"


def test_what_is_printed_is_what_the_losses_are(
    adapter: Path, saved_llama: Path, tokenizer: PreTrainedTokenizerFast, page: Path, capsys
) -> None:
    call("compare", adapter, "--text", page, "--seq-len", 16, "--tokens", 64)
    printed = capsys.readouterr().out
    ids = torch.tensor(tokenizer(page.read_text()).input_ids[:64]).view(4, 16)
    dense, sparse = load_dense(str(saved_llama))[0], gossamer.load_adapter(adapter)
    with torch.no_grad(), gossamer.counted_links(sparse) as counts:
        logits, wanted = sparse(input_ids=ids).logits, dense(input_ids=ids).logits
    opened = sum(int(count.open_links.sum()) for count in counts.values())
    allowed = sum(int(count.allowed_links.sum()) for count in counts.values())
    assert f"{cross_entropy(wanted, ids):.4f}" in printed
    assert f"{cross_entropy(logits, ids):.4f}" in printed
    assert f"{kl_divergence(wanted, logits):.4f}" in printed
    assert f"{100 * opened / allowed:.3f}" in printed
    assert "60 tokens" in " ".join(printed.split())


def test_adapters_are_half_the_size_in_bfloat16(adapter: Path, tmp_path: Path) -> None:
    model = gossamer.load_adapter(adapter, merge=False)
    gossamer.save_adapter(model, tmp_path / "again")
    small, large = (path / "adapter_model.safetensors" for path in (adapter, tmp_path / "again"))
    assert small.stat().st_size < 0.75 * large.stat().st_size
    again = gossamer.load_adapter(tmp_path / "again", merge=False)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.fixture
def task_path(tmp_path: Path) -> Path:
    chance = random.Random(0)
    questions = [
        {
            "prompt": " ".join(chance.choices(WORDS, k=6)),
            "choices": chance.sample(WORDS, 3),
            "answer": chance.randrange(3),
        }
        for _ in range(20)
    ]
    (tmp_path / "tiny.yaml").write_text(TINY_TASK)
    (tmp_path / "tiny.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    return tmp_path


def test_tasks_and_text_are_written_to_a_file(
    adapter: Path,
    saved_llama: Path,
    tokenizer: PreTrainedTokenizerFast,
    page: Path,
    task_path: Path,
    capfd,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.chdir(task_path)  # not a repository, of which the harness asks git
    out = task_path / "compared.json"
    measured = ("--text", page, "--seq-len", 16, "--tokens", 64)
    call("compare", adapter, "--tasks", "tiny", "--task-path", task_path, *measured, "--out", out)
    record = json.loads(out.read_text())
    config = TasksConfig(["tiny"], task_path)
    models = {"dense": load_dense(str(saved_llama))[0], "sparse": gossamer.load_adapter(adapter)}
    wanted = {name: measure_tasks(model, tokenizer, config)["tiny"]["metrics"] for name, model in models.items()}
    assert record["tasks"]["tiny"]["models"] == wanted
    assert wanted["dense"] != wanted["sparse"]
    assert record["tasks"]["tiny"]["examples"] == 20
    assert (record["model"], record["dense"], record["text"]) == (str(adapter), str(saved_llama), str(page))
    assert record["lengths"][0]["tokens_evaluated"] == 60
    printed = capfd.readouterr()
    assert f"{wanted['sparse']['acc']['value']:.4f}" in printed.out
    assert "fatal" not in printed.err


def test_what_cannot_be_compared_is_refused_before_anything_is_loaded(page: Path, tmp_path: Path) -> None:
    for arguments, message in (
        ((), "nothing to compare the models on: give --text, --tasks, or both"),
        (("--text", page, "--limit", 3), "--limit says how to measure tasks"),
        (("--tasks", ","), "--tasks names no task"),
        (("--text", page, "--out", tmp_path / "none" / "x.json"), "there is no directory"),
    ):
        with pytest.raises(GossamerError, match=message):
            call("compare", "not-a-model", *arguments)


def test_a_text_that_cannot_be_read_is_refused_before_tasks_take_their_time(
    adapter: Path, task_path: Path, capsys
) -> None:
    pytest.importorskip("lm_eval")
    missing = task_path / "missing.txt"
    with pytest.raises(GossamerError, match=r"missing\.txt"):
        call("compare", adapter, "--tasks", "tiny", "--task-path", task_path, "--text", missing)
    assert "tasks:" not in capsys.readouterr().out


def test_the_dense_model_has_to_be_known(
    saved_llama: Path, tokenizer: PreTrainedTokenizerFast, page: Path, tmp_path: Path, capsys
) -> None:
    gossamer.save(gossamer.add_gates(tiny_model("llama")), tmp_path / "sparse", tokenizer)
    with pytest.raises(GossamerError, match="does not say which dense model it was made from; give it as --dense"):
        call("compare", tmp_path / "sparse", "--text", page)
    call("compare", tmp_path / "sparse", "--text", page, "--dense", saved_llama, "--seq-len", 16)
    assert "beside its dense model" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(GossamerError, match="is a dense model; give a sparse one"):
        call("compare", saved_llama, "--text", page)
    with pytest.raises(GossamerError, match="shorter than one block of 5000"):
        call("compare", tmp_path / "sparse", "--text", page, "--dense", saved_llama, "--seq-len", 5000)
