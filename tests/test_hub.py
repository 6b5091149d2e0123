"""Models on the Hub: pushed and fetched over HTTP by the official client, with a stand-in for the server."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from transformers import PreTrainedTokenizerFast

import gossamer
from families import tiny_model
from gossamer.errors import GossamerError
from gossamer.evaluation.evaluate import evaluate_run
from gossamer.models.lora import add_adapters
from gossamer.models.pretrained import load_dense
from gossamer.models.repositories import hub_faults
from gossamer.runs.job import post_train
from gossamer.runs.settings import RunConfig
from gossamer.training.settings import TrainingConfig
from hub_server import TOKEN, Hub, served_hub

SESSION = Path(__file__).parent / "hub_session.py"


@pytest.fixture(scope="module")
def folder(
    saved_llama: Path, text: Path, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with a complete model, adapters and a run with adapters."""
    folder = tmp_path_factory.mktemp("pushed")
    gossamer.save(gossamer.add_gates(tiny_model("llama"), gate_bias=0.1), folder / "whole", tokenizer)
    adapted = gossamer.add_gates(load_dense(str(saved_llama))[0], gate_bias=0.1)
    add_adapters(adapted, rank=2, alpha=4.0)
    gossamer.save_adapter(adapted, folder / "adapter")
    training = TrainingConfig(train="lora", batch_size=2, checkpoint_every=0, precision="fp32")
    sizes = {"tokens": 2 * 2 * 16, "seq_len": 16, "validation_tokens": 32, "held_out_tokens": 64}
    run = post_train(RunConfig(str(saved_llama), str(text), control=False, training=training, **sizes), folder / "run")
    evaluate_run(run)
    return folder


def environment(hub: Hub, cache: Path, **more: str) -> dict[str, str]:
    # Xet, the client's other way to send large files, needs a separate server.
    settings = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(cache), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    return {**os.environ, "HF_HUB_OFFLINE": "0", "COLUMNS": "200", **settings, **more}


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with served_hub() as hub:
        hub.repositories["org/dense"] = {"commits": {}, "tags": {}, "main": "", "private": False}
        hub.commit("org/dense", {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"unread"})
        yield hub


def said_by_session(*arguments: object, env: dict[str, str]) -> Any:
    """Run the session in a separate process, because the client reads its settings when it is imported."""
    line = [sys.executable, str(SESSION), *map(str, arguments)]
    result = subprocess.run(line, env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def found(hub: Hub, folder: Path, cache: Path) -> dict[str, Any]:
    return said_by_session("online", folder, env=environment(hub, cache))


def card(hub: Hub, name: str) -> ModelCard:
    _, files = hub.files(name, "main")
    return ModelCard(files["README.md"].decode(), ignore_metadata_errors=False)


def test_what_is_pushed_comes_back(found: dict[str, Any], hub: Hub) -> None:
    assert found["address"] == f"{hub.endpoint}/org/whole"
    assert hub.repositories["org/whole"]["private"] is True
    for same in ("whole is the same", "adapters are the same", "loads merged", "tokenizer of whole",
                 "tokenizer of adapter"):  # fmt: skip
        assert found[same] is True, same
    assert found["rank that peft reads"] == 2
    _, files = hub.files("org/adapter", "main")
    assert set(files) == {
        ".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors", "gossamer_gates.safetensors",
    }  # fmt: skip
    assert card(hub, "org/whole").data.license == "apache-2.0"
    assert card(hub, "org/adapter").data.license == "mit"


def test_the_card_of_a_run_holds_its_figures(found: dict[str, Any], hub: Hub, folder: Path) -> None:
    code, out, _ = found["push run"]
    assert (code, out.strip()) == (0, f"{hub.endpoint}/org/run")
    metrics = json.loads((folder / "run" / "metrics.json").read_text())
    written = card(hub, "org/run")
    data = written.data
    assert (data.license, data.base_model, data.library_name) == ("apache-2.0", "org/dense", "gossamer")
    assert data.pipeline_tag == "text-generation"
    assert {"sparse-attention", "interpretability"} <= set(data.tags)
    values = {result.metric_type: result.metric_value for result in data.eval_results}
    assert values == {key: metrics[key] for key in ("open_fraction", "open_links_per_query", "kl", "loss_sparse")}
    assert "model-index" in yaml.safe_load(written.content.split("---")[1])
    for word in (f"{100 * metrics['open_fraction']:.3g} %", f"{metrics['seq_len']} tokens", 'load("org/run")',
                 f"{metrics['constraint_bound']:.4g}", "met"):  # fmt: skip
        assert word in written.text, word
    assert str(folder) not in written.content
    assert "/" not in {result.dataset_name for result in data.eval_results}.pop()
    code, out, err = found["push adapters"]
    assert code == 0
    assert "licence" in err
    adapters = card(hub, "org/run-adapter").data
    assert adapters.library_name == "peft"
    assert adapters.license is None
    assert adapters.base_model is None  # the base is a local directory


def test_commands_take_an_id(found: dict[str, Any]) -> None:
    code, out, _ = found["inspect"]
    assert code == 0
    assert "Sparse model org/run" in out


def test_nothing_but_what_gossamer_wrote_is_fetched(found: dict[str, Any], hub: Hub) -> None:
    assert "holds a dense llama model" in found["dense"]
    fetched = [path for _, path in hub.requests if "/resolve/" in path]
    assert any(path.startswith("/org/dense/") for path in fetched)
    assert not any(path.endswith("/model.safetensors") for path in fetched)


def test_faults_are_told_in_a_line(found: dict[str, Any], hub: Hub) -> None:
    assert "hf auth login" in found["no token"]
    assert "org/refused" not in hub.repositories
    assert "no directory org/missing here, and no such repository" in found["missing"]
    assert "org/whole has no such revision" in found["revision"]
    assert "no gates" in found["no gates"]
    assert "org/name" in found["bad id"]
    assert not any("\n" in found[key] for key in ("dense", "missing", "revision", "no gates", "bad id", "no token"))


def test_what_the_hub_says_is_not_cut_off() -> None:
    said = " ".join(f"word{number}" for number in range(100))
    with pytest.raises(GossamerError, match=f"the Hub cannot give it: {said}$"), hub_faults("org/name", "missing"):
        raise OSError(said)


def test_offline_the_cache_is_enough(found: dict[str, Any], hub: Hub, cache: Path) -> None:
    gated, told = said_by_session("offline", env=environment(hub, cache, HF_HUB_OFFLINE="1"))
    assert gated
    assert "org/never-fetched is no directory here, and the Hub cannot give it" in told
