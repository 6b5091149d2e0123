"""gossamer task, circuits, export and evaluate-circuit on a run."""

import json
import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

import gossamer
from command_line import Finished, assert_refused, gossamer_command
from families import tiny_model


def test_task_shows_examples_and_how_well_the_model_does(finished: Finished, own_task: Path) -> None:
    out = finished.out
    for model in (out, out / "model"):
        result = gossamer_command("task", own_task, "--model", model, "--examples", 4)
        assert result.returncode == 0, result.stderr
        assert "the sparse" in result.stdout
        assert re.search(r"prompts\s+│\s+4", result.stdout)
        assert "logit difference, corrupted" in result.stdout


def test_circuits_of_some_levels_under_another_ablation_stand_beside_the_others(copied: Path, own_task: Path) -> None:
    out = copied
    line = ["circuits", out, "--task", own_task, "--examples", 4, "--score", "eap", "--force"]
    result = gossamer_command(*line, "--ablation", "zero", "--levels", "links")
    assert result.returncode == 0, result.stderr
    record = json.loads((out / "circuits" / "own-zero" / "circuits.json").read_text())
    assert record["ablation"] == "zero"
    assert set(record["models"]["sparse"]["levels"]) == {"links"}
    assert_refused(gossamer_command(*line, "--levels", "links,heads"), "--levels", "links,heads", "nodes")
    assert_refused(gossamer_command(*line, "--ablation", "mean", "--levels", "links"), "no mean")


def test_circuits_leaves_a_record_of_both_models(copied: Path, own_task: Path) -> None:
    out = copied
    result = gossamer_command("circuits", out, "--task", own_task, "--examples", 4, "--force")
    assert result.returncode == 0, result.stderr
    assert "dense : sparse" in result.stdout
    record = json.loads((out / "circuits" / "own" / "circuits.json").read_text())
    assert record["prompts"] == 4
    scores = load_file(out / "circuits" / "own" / "scores.safetensors")
    for name, model in record["models"].items():
        assert set(model["levels"]) == {"nodes", "edges", "links"}
        assert model["levels"]["nodes"]["total"] == len(scores[name])
        assert model["levels"]["edges"]["metric_everything"] == pytest.approx(model["metric_clean"], abs=1e-4)
        assert model["levels"]["edges"]["metric_nothing"] == pytest.approx(model["metric_corrupted"], abs=1e-4)
        assert model["levels"]["links"]["points"][-1]["faithfulness"] == pytest.approx(1.0)


def test_the_page_shows_the_very_prompt_of_the_circuit(finished: Finished, own_task: Path, tmp_path: Path) -> None:
    """With a tokenizer that adds a start token before every text, like that of Llama 3."""
    model, out = tmp_path / "model", tmp_path / "run"
    shutil.copytree(finished.model, model)
    shutil.copytree(finished.out, out)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    begin = [("<s>", tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=begin)
    tokenizer.save_pretrained(model)
    (out / "config.json").write_text((out / "config.json").read_text().replace(str(finished.model), str(model)))
    line = ["circuits", out, "--task", own_task, "--examples", 2, "--score", "eap", "--levels", "links", "--force"]
    result = gossamer_command(*line)
    assert result.returncode == 0, result.stderr
    links = json.loads((out / "circuits" / "own" / "links.json").read_text())
    assert links["tokens"][:2] == ["<s>", "the"]
    result = gossamer_command("report", out)
    assert result.returncode == 0, result.stderr
    shown = json.loads((out / "attention.json").read_text())["prompts"][0]
    assert shown["note"] == "task"
    assert shown["tokens"] == links["tokens"]


def test_a_circuit_goes_out_and_comes_back(copied: Path, own_task: Path, tmp_path: Path) -> None:
    out = copied
    arguments = ["--task", own_task, "--examples", 4, "--score", "eap", "--force"]
    result = gossamer_command("circuits", out, *arguments, "--ablation", "zero", "--levels", "links", "--signed")
    assert result.returncode == 0, result.stderr
    line = ["circuits", out, *arguments, "--seeds", 2, "--ablation", "zero", "--signed"]
    assert_refused(gossamer_command(*line), "own-zero holds circuits found with", "seeds 1, not 2", "--replace")
    result = gossamer_command(*line, "--replace")
    assert result.returncode == 0, result.stderr
    assert "2 variations" in result.stdout
    record = json.loads((out / "circuits" / "own-zero" / "circuits.json").read_text())
    assert [each["seed"] for each in record["variations"]] == [0, 1]
    assert 0 <= record["overlap"]["sparse"] <= 1
    links = json.loads((out / "circuits" / "own-zero" / "links.json").read_text())
    assert len(links["tokens"]) == len(links["prompt"].split()) == len(links["ids"])
    everything = record["models"]["sparse"]["levels"]["edges"]["total"]
    for suffix in (".json", ".pt", ".graphml"):
        file = tmp_path / f"circuit{suffix}"
        result = gossamer_command("export", out, "--task", own_task, "--out", file,
                                  "--edges", everything, "--ablation", "zero")  # fmt: skip
        assert result.returncode == 0, result.stderr
        result = gossamer_command(
            "evaluate-circuit", file, "--model", out, "--task", own_task, "--examples", 4, "--force"
        )
        assert result.returncode == 0, result.stderr
        assert re.search(r"faithfulness\s+│\s+1\.000", result.stdout)
    few = record["models"]["sparse"]["levels"]["edges"]["shares"][-3]
    (measured,) = (
        point["metric"] for point in record["models"]["sparse"]["levels"]["edges"]["points"] if point["size"] == few
    )
    gossamer_command("export", out, "--task", own_task, "--out", file, "--edges", few, "--ablation", "zero")
    proof = ("--model", out, "--task", own_task, "--examples", 4, "--ablation", "zero", "--force")
    result = gossamer_command("evaluate-circuit", file, *proof)
    assert re.search(rf"mean logit difference\s+│\s+{measured:.3f}".replace("-", r"\-"), result.stdout), result.stdout
    another = gossamer_command("evaluate-circuit", file, "--model", "smollm2", "--task", "ioi")
    assert_refused(another, "circuit.graphml is a circuit of another model", "30 layers of 9 heads")
    assert_refused(gossamer_command("export", out, "--task", "ioi", "--out", file), "has no circuits of ioi")
    wrong = gossamer_command("export", out, "--task", own_task, "--out", tmp_path / "circuit.xml",
                             "--edges", 3, "--ablation", "zero")  # fmt: skip
    assert_refused(wrong, "circuit.xml has to end in .json, .pt or .graphml")
    assert_refused(gossamer_command("circuits", out, "--task", own_task, "--rephrased"), "no other phrasings")


def test_what_circuits_cannot_use_is_refused(copied: Path, own_task: Path, tmp_path: Path) -> None:
    out = copied
    assert_refused(gossamer_command("task", "oii", "--model", out), "no task 'oii'", "ioi")
    assert_refused(gossamer_command("circuits", tmp_path, "--task", own_task), "is not a run")
    uneven = tmp_path / "uneven.jsonl"
    uneven.write_text(json.dumps({"clean": "the", "corrupted": "the row", "answers": [" one"], "wrong": [" two"]}))
    assert_refused(gossamer_command("task", uneven, "--model", out), "has 1 tokens, the corrupted one 2")
    backwards = tmp_path / "backwards.jsonl"
    rows = [json.loads(line) for line in own_task.read_text().splitlines()]
    ability = {}
    for name, flip in (("own", False), ("flipped", True)):
        changed = [{**row, "answers": row["wrong"], "wrong": row["answers"]} if flip else row for row in rows]
        backwards.write_text("".join(json.dumps(row) + "\n" for row in changed))
        ability[name] = gossamer_command("circuits", out, "--task", backwards, "--examples", 4)
    refused = [result for result in ability.values() if result.returncode]
    assert refused  # a model cannot prefer both answers
    assert_refused(refused[0], "the model cannot do backwards", "% of 4 prompts right", "--force")


def test_a_model_without_a_tokenizer_is_named(saved_llama: Path, own_task: Path, tmp_path: Path) -> None:
    gossamer.save(gossamer.add_gates(tiny_model("llama")), tmp_path / "gated")
    result = gossamer_command("task", own_task, "--model", tmp_path / "gated")
    assert_refused(result, str(tmp_path / "gated"), "has no tokenizer")
