"""Saved models: the same logits after loading, no silent loading as dense, no half-written directories."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import gossamer
from families import CONFIGS, tiny_model, tokens
from gossamer import GossamerError
from gossamer.models.checkpoint import gate_biases, is_saved_model


@pytest.fixture
def gated():
    model = gossamer.add_gates(tiny_model("llama"))
    for index, parameter in enumerate(p for n, p in model.named_parameters() if n.endswith("gate_bias")):
        parameter.data.copy_(torch.arange(4) * 0.1 + index)
    return model


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip_gives_the_same_logits(name: str, tmp_path: Path) -> None:
    model = gossamer.add_gates(tiny_model(name), gate_bias=-0.7)
    gossamer.save(model, tmp_path / "model")
    loaded = gossamer.load(tmp_path / "model")
    ids = tokens(2, 14)
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    assert type(loaded) is type(model)


def test_gates_and_tokenizer_come_back(gated, tokenizer, tmp_path: Path) -> None:
    gossamer.save(gated, tmp_path / "model", tokenizer)
    assert torch.equal(gate_biases(gossamer.load(tmp_path / "model")), gate_biases(gated))
    again = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert again("one two")["input_ids"] == tokenizer("one two")["input_ids"]
    assert is_saved_model(tmp_path / "model")


def test_plain_transformers_refuses_the_directory(gated, tmp_path: Path) -> None:
    gossamer.save(gated, tmp_path / "model")
    with pytest.raises(ValueError, match="gossamer"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with pytest.raises(OSError, match=r"model\.safetensors"):
        type(gated).from_pretrained(tmp_path / "model")
    assert "gossamer.load" in (tmp_path / "model" / "README.md").read_text()


@pytest.mark.parametrize("base", ["org/tiny", "my: model", "[a, b]", "{here}", "./{here}", ""])
def test_the_card_names_a_base_of_the_hub_and_no_path(base: str, gated, tmp_path: Path) -> None:
    gated.config.name_or_path = base.format(here=tmp_path)
    gossamer.save(gated, tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text()
    known = {"base_model": base} if base and "here" not in base else {}
    assert yaml.safe_load(card.split("---")[1]) == {"library_name": "gossamer", **known}
    assert str(tmp_path) not in card


@torch.no_grad()
@pytest.mark.parametrize(
    "wrap",
    [
        torch.compile,
        torch.nn.DataParallel,
        lambda model: torch.nn.DataParallel(torch.compile(model)),
        lambda model: setattr(model.model.layers, "1", torch.compile(model.model.layers[1])) or model,
    ],
)
def test_a_compiled_or_parallel_model_is_saved_as_it_is_within(wrap, gated, tmp_path: Path) -> None:
    expected = gated(input_ids=tokens(1, 9)).logits
    gossamer.save(wrap(gated), tmp_path / "model")
    loaded = gossamer.load(tmp_path / "model")
    assert torch.equal(loaded(input_ids=tokens(1, 9)).logits, expected)
    assert json.loads((tmp_path / "model" / "base_config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


@torch.no_grad()
def test_weights_saved_under_the_names_of_a_compiled_model_are_read(gated, tmp_path: Path) -> None:
    gossamer.save(gated, tmp_path / "model")
    file = tmp_path / "model" / "gossamer.safetensors"
    save_file({f"_orig_mod.{name}": value for name, value in load_file(file).items()}, file, {"format": "pt"})
    ids = tokens(1, 9)
    assert torch.equal(gossamer.load(tmp_path / "model")(input_ids=ids).logits, gated(input_ids=ids).logits)


def test_dtype_can_be_chosen(gated, tmp_path: Path) -> None:
    gossamer.save(gated, tmp_path / "model")
    assert gossamer.load(tmp_path / "model", dtype=torch.bfloat16).dtype == torch.bfloat16


def test_saving_again_replaces_the_whole_directory(gated, tmp_path: Path) -> None:
    gossamer.save(gated, tmp_path / "model")
    (tmp_path / "model" / "stale").touch()
    gossamer.save(gated, tmp_path / "model")
    assert not (tmp_path / "model" / "stale").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_failed_save_leaves_the_old_directory(gated, tmp_path: Path) -> None:
    gossamer.save(gated, tmp_path / "model")
    before = sorted(path.name for path in (tmp_path / "model").iterdir())
    with pytest.raises(GossamerError, match="no gates"):
        gossamer.save(tiny_model("llama"), tmp_path / "model")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_damaged_directories_are_named(gated, tmp_path: Path) -> None:
    with pytest.raises(GossamerError, match="is not a saved gossamer model"):
        gossamer.load(tmp_path / "missing")
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    with pytest.raises(GossamerError, match="holds a dense llama model"):
        gossamer.load(tmp_path / "dense")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"config": {}, "versions": {}}')
    with pytest.raises(GossamerError, match="holds no model"):
        gossamer.load(tmp_path / "run")
    (tmp_path / "run" / "blocks.safetensors").touch()
    with pytest.raises(GossamerError, match=f"is a run, .* sparse model is in {tmp_path}/run/model"):
        gossamer.load(tmp_path / "run")
    gossamer.save(gated, tmp_path / "model")
    weights = tmp_path / "model" / "gossamer.safetensors"
    tensors = load_file(weights)
    for missing, message in (("model.norm.weight", "lacks model.norm.weight"),
                             ("model.layers.1.self_attn.gate_bias", "layers.1.self_attn.gate_bias")):  # fmt: skip
        save_file({name: value for name, value in tensors.items() if name != missing}, weights, {"format": "pt"})
        with pytest.raises(GossamerError, match=message):
            gossamer.load(tmp_path / "model")
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(GossamerError, match=r"gossamer\.safetensors cannot be used: cut short"):
        gossamer.load(tmp_path / "model")
    save_file({**tensors, "model.layers.0.self_attn.gate_bias": torch.full((4,), torch.nan)}, weights, {"format": "pt"})
    with pytest.raises(GossamerError, match=r"layers\.0\.self_attn\.gate_bias has values that are not finite"):
        gossamer.load(tmp_path / "model")
    save_file(tensors, weights, {"format": "pt"})
    file = tmp_path / "model" / "base_config.json"
    written = json.loads(file.read_text())
    for changes in ({"model_type": "none such"}, {"model_type": 3}, {"num_attention_heads": "four"}):
        file.write_text(json.dumps({**written, **changes}))
        with pytest.raises(GossamerError, match=r"save the model anew with gossamer\.save"):
            gossamer.load(tmp_path / "model")
    file.write_text(json.dumps({key: value for key, value in written.items() if key != "model_type"}))
    with pytest.raises(GossamerError, match=r"base_config\.json cannot be used: it lacks 'model_type'"):
        gossamer.load(tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "format": 99}))
    with pytest.raises(GossamerError, match="format 99"):
        gossamer.load(tmp_path / "model")
