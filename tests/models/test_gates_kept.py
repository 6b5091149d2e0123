"""Gates are never lost silently: by saving, loading, pickling, or another attention implementation."""

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import gossamer
from families import tiny_model
from gossamer.errors import GossamerError

IDS = torch.arange(5, 13)[None]


@pytest.fixture
def gated():
    return gossamer.add_gates(tiny_model("llama"), gate_bias=0.3).eval()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=IDS).logits


def test_save_pretrained_writes_a_gated_model(gated, tokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    gated.save_pretrained(tmp_path, safe_serialization=True)
    assert torch.equal(logits(gossamer.load(tmp_path)), logits(gated))
    assert (tmp_path / "tokenizer.json").exists()
    with pytest.raises(ValueError, match="gossamer"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(GossamerError, match="save_pretrained of a gated model knows no push_to_hub"):
        gated.save_pretrained(tmp_path, push_to_hub=True)


def test_a_copy_saves_itself_and_a_dense_model_as_ever(gated, tmp_path: Path) -> None:
    other = copy.deepcopy(gated)
    with torch.no_grad():
        other.lm_head.weight.mul_(2)
    other.save_pretrained(tmp_path / "other")
    assert torch.equal(logits(gossamer.load(tmp_path / "other")), logits(other))
    dense = gossamer.remove_gates(gated)
    dense.save_pretrained(tmp_path / "dense")
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")), logits(dense))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_model_is_loaded_in_the_precision_it_was_saved_in(gated, tmp_path: Path, dtype: torch.dtype) -> None:
    gossamer.save(gated.to(dtype), tmp_path / "model")
    loaded, wanted = gossamer.load(tmp_path / "model"), gated.state_dict()
    assert loaded.lm_head.weight.dtype == dtype
    for name, value in loaded.state_dict().items():
        assert torch.equal(value.to(dtype), wanted[name])
        assert value.dtype == (torch.float32 if name.endswith("gate_bias") else dtype)


def test_a_pickled_model_has_its_gates_in_a_new_process(gated, tmp_path: Path) -> None:
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(gated))
    torch.save(logits(gated), tmp_path / "logits.pt")
    script = (
        "import pickle, sys, torch; model = pickle.load(open(sys.argv[1], 'rb'));"
        "assert torch.equal(model(input_ids=torch.arange(5, 13)[None]).logits, torch.load(sys.argv[2]))"
    )
    command = [sys.executable, "-c", script, tmp_path / "model.pkl", tmp_path / "logits.pt"]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_another_attention_implementation_is_an_error(gated) -> None:
    wanted = logits(gated)
    gated.set_attn_implementation("eager")
    assert gossamer.is_gated(gated)
    with pytest.raises(GossamerError, match="set to eager, so its gates would do nothing"):
        logits(gated)
    gated.set_attn_implementation("gossamer")
    assert torch.equal(logits(gated), wanted)
    gated.set_attn_implementation("eager")
    torch.testing.assert_close(logits(gossamer.remove_gates(gated)), logits(tiny_model("llama")))


def test_attention_weights_are_refused_not_left_out(gated) -> None:
    with pytest.raises(GossamerError, match="returns no attention weights"):
        gated(input_ids=IDS, output_attentions=True)


def test_a_model_made_from_the_config_has_no_gates_and_says_so(gated) -> None:
    fresh = AutoModelForCausalLM.from_config(gated.config, attn_implementation="gossamer")
    with pytest.raises(GossamerError, match="has no gates"):
        logits(fresh)
