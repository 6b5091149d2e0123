"""gossamer explain, in this process, on runs, saved models, adapters and dense models."""

import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import gossamer
from families import tiny_model
from forked import run_command
from gossamer.circuits.link_masks import LinkMasks
from gossamer.cli import app
from gossamer.errors import GossamerError
from gossamer.explanations.prediction import Prediction
from gossamer.models.lora import add_adapters
from gossamer.models.pretrained import load_dense
from plain_links import plainly

PROMPT = "the sparse model reads"


def call(*arguments: object) -> None:
    app([str(argument) for argument in arguments], standalone_mode=False)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    folder = tmp_path_factory.mktemp("sparse") / "model"
    gossamer.save(gossamer.add_gates(tiny_model("llama"), gate_bias=0.5), folder, tokenizer)
    return folder


def test_an_explanation_beside_the_dense_model(saved: Path, saved_llama: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "explain.html"
    call(
        "explain",
        saved,
        PROMPT,
        "--dense",
        saved_llama,
        "--share",
        0.8,
        "--out",
        out,
        "--figures",
        tmp_path / "figures",
    )
    printed = capsys.readouterr().out
    record = json.loads((tmp_path / "explain.json").read_text())
    assert record["kind"] == record["dense"]["kind"] == "complete"
    assert f"{record['size']:,} links (complete): alone they keep {100 * record['kept']:.0f} %" in printed
    assert f"dense model: {record['dense']['size']:,} links" in printed
    assert record["dense"]["candidates"] == 3 * 4 * len(record["ids"]) * (len(record["ids"]) + 1) // 2
    assert record["dense_links_per_link"] == pytest.approx(record["dense"]["size"] / record["size"])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["explain.html", "explain.json", "figures"]
    assert (tmp_path / "figures" / "explanation.png").read_bytes()[:4] == b"\x89PNG"
    assert "<svg" in (tmp_path / "figures" / "explanation.svg").read_text()
    for model, found in ((gossamer.load(saved), record), (load_dense(str(saved_llama))[0], record["dense"])):
        own = torch.zeros(3, 4, len(record["ids"]), len(record["ids"]), dtype=torch.bool)
        own[tuple(torch.tensor(found["links"]).T)] = True
        everything = torch.ones_like(own)
        kept, left, full, nothing = (
            plainly(model, record["ids"], record["target"]["id"], mask).item()
            for mask in (own, ~own, everything, ~everything)
        )
        assert full == pytest.approx(found["metric_full"], abs=1e-5)
        assert nothing == pytest.approx(found["metric_none"], abs=1e-5)
        assert (kept - nothing) / (full - nothing) == pytest.approx(found["kept"], abs=1e-4)
        assert (left - nothing) / (full - nothing) == pytest.approx(found["left_when_cut"], abs=1e-4)


def test_adapters_are_explained_on_the_model_they_name(
    saved_llama: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = gossamer.add_gates(tiny_model("llama"), gate_bias=0.5)
    model.name_or_path = str(saved_llama)
    add_adapters(model, rank=2, alpha=4)
    gossamer.save_adapter(model, tmp_path / "adapter")
    call("explain", tmp_path / "adapter", PROMPT, "--seeds", 1, "--share", 0.5, "--out", tmp_path / "a.json")
    record = json.loads((tmp_path / "a.json").read_text())
    whole = gossamer.load_adapter(tmp_path / "adapter").requires_grad_(False)
    masks = LinkMasks(whole, Prediction(tuple(record["ids"]), record["target"]["id"]))
    assert record["candidates"] == len(masks)
    assert record["metric_full"] == pytest.approx(masks.full, abs=1e-5)
    assert record["overlap"] is None


def test_a_graph_for_other_tools(saved: Path, tmp_path: Path) -> None:
    import networkx

    call("explain", saved, PROMPT, "--target", "row", "--seeds", 1, "--share", 0.5, "--out", tmp_path / "x.graphml")
    graph = networkx.read_graphml(tmp_path / "x.graphml")
    assert graph.number_of_edges() > 0
    assert {"layer", "head"} <= set(next(iter(graph.edges(data=True)))[2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((PROMPT, "--target", "the sparse"), "--target 'the sparse' is 2 tokens ('the', 'sparse'); give one"),
        ((PROMPT, "--target", "Ω"), "--target 'Ω' is unknown to the tokenizer"),
        (("",), "the prompt is empty"),
        ((" ".join(["the"] * 99),), "the prompt has 99 tokens, more than the model's context, 64"),
        ((PROMPT, "--out", "x.pdf"), "--out x.pdf: give a file that ends in .html, .json or .graphml"),
        ((PROMPT, "--out", "no/where.html"), "--out no/where.html: there is no directory no"),
        ((PROMPT, "--share", "2"), "--share 2 of the metric cannot be kept"),
        (("--text", "x.txt", "--dense", "y", "--seq-len", "16,512", "--out", "x.jsonl"), "--seq-len 512 is more than"),
        (("--text", "x.txt"), "give --dense, the model that MODEL was made from"),
        ((), "give a PROMPT or --text, one of them"),
    ],
)
def test_bad_input_ends_with_one_line(saved: Path, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    import os

    done = run_command(["explain", saved, *arguments], os.environ, cwd=tmp_path)
    assert done.returncode == 2
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_not_dense_is_refused_as_the_dense_one(saved: Path) -> None:
    with pytest.raises(GossamerError, match="is a sparse model; give a dense one"):
        call("explain", saved, PROMPT, "--dense", saved)
