"""Adapters saved without their base: they restore the same model, plain peft reads them, other bases are refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import gossamer
from families import CONFIGS, tiny_config, tiny_model, tokens
from gossamer import GossamerError
from gossamer.models.checkpoint import gate_biases
from gossamer.models.lora import add_adapters, has_adapters
from gossamer.models.lora_files import SAMPLES, samples

IDS = tokens(2, 14)
FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors", "gossamer_gates.safetensors"}


def adapted(name: str = "llama", targets: tuple[str, ...] = ()) -> PreTrainedModel:
    """Create a tiny gated model whose adapters and gates have random values, as if trained."""
    model = gossamer.add_gates(tiny_model(name))
    add_adapters(model, rank=2, alpha=4.0, targets=targets)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        for key, parameter in model.named_parameters():
            if "lora_B" in key or key.endswith("gate_bias"):
                parameter.copy_(0.2 * torch.randn(parameter.shape))
    return model.eval()


@torch.no_grad()
def logits_and_links(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    with gossamer.counted_links(model) as counts:
        logits = model(input_ids=IDS).logits
    return logits, torch.stack([count.open_links for count in counts.values()])


@pytest.mark.parametrize("name", CONFIGS)
def test_adapters_on_a_base_from_elsewhere_are_exactly_the_merged_model(name: str, tmp_path: Path) -> None:
    model = adapted(name)
    gossamer.save_adapter(model, tmp_path / "adapter")
    apart = logits_and_links(model)
    gossamer.merge_adapters(model)
    gossamer.save(model, tmp_path / "model")
    logits, links = logits_and_links(gossamer.load(tmp_path / "model"))
    base = tiny_model(name)
    loaded = gossamer.load_adapter(tmp_path / "adapter", base)
    assert torch.equal(logits_and_links(loaded)[0], logits)
    assert torch.equal(logits_and_links(loaded)[1], links)
    assert torch.equal(gate_biases(loaded), gate_biases(model))
    assert not loaded.training
    assert not has_adapters(loaded)
    assert not gossamer.is_gated(base)
    unmerged = gossamer.load_adapter(tmp_path / "adapter", base, merge=False, inplace=True)
    assert unmerged is base
    assert has_adapters(unmerged)
    assert torch.equal(logits_and_links(unmerged)[0], apart[0])
    assert torch.equal(logits_and_links(unmerged)[1], apart[1])
    trained = {key for key, parameter in unmerged.named_parameters() if parameter.requires_grad}
    assert trained == {key for key, _ in unmerged.named_parameters() if "lora_" in key or "gate_bias" in key}


def test_a_base_by_its_directory(saved_llama: Path, tmp_path: Path) -> None:
    model = adapted(targets=("q_proj", "mlp.down_proj"))
    gossamer.save_adapter(model, tmp_path / "adapter")
    gossamer.merge_adapters(model)
    for base in (saved_llama, str(saved_llama)):
        loaded = gossamer.load_adapter(tmp_path / "adapter", base)
        loaded.set_attn_implementation("gossamer")
        for found, wanted in zip(logits_and_links(loaded), logits_and_links(model), strict=True):
            assert torch.equal(found, wanted)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_plain_peft_loads_the_adapters_on_the_dense_base(name: str, tmp_path: Path) -> None:
    from peft import PeftModel

    model = adapted(name)
    gossamer.save_adapter(model, tmp_path / "adapter")
    plain = PeftModel.from_pretrained(tiny_model(name), str(tmp_path / "adapter")).eval()
    without_gates = gossamer.remove_gates(model)
    assert torch.equal(plain(input_ids=IDS).logits, without_gates(input_ids=IDS).logits)
    assert not torch.allclose(plain(input_ids=IDS).logits, tiny_model(name)(input_ids=IDS).logits, atol=0.05)


def test_the_directory_holds_what_was_trained_and_little_more(tmp_path: Path) -> None:
    model = adapted()
    gossamer.save_adapter(model, tmp_path / "adapter")
    folder = tmp_path / "adapter"
    assert {file.name for file in folder.iterdir()} == FILES
    trained = sum(p.numel() for key, p in model.named_parameters() if "lora_" in key)
    tensors = load_file(folder / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in tensors.values()) == trained
    assert all(key.startswith("base_model.model.model.layers.") for key in tensors)
    assert (folder / "gossamer_gates.safetensors").stat().st_size < 8_000
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 2, 4.0)
    assert set(config["target_modules"]) == {f"self_attn.{part}_proj" for part in "qkvo"}
    assert "gossamer.load_adapter" in (folder / "README.md").read_text()


ELSEWHERE = "path/to/the/dense/model"


@pytest.mark.parametrize(
    "base,shown", [("org/tiny", "org/tiny"), ("my: model", "my: model"), ("", ELSEWHERE), ("{here}", ELSEWHERE)]
)
def test_the_card_names_a_base_of_the_hub_and_no_path(base: str, shown: str, tmp_path: Path) -> None:
    model = adapted()
    name = base.format(here=tmp_path)
    model.peft_config["default"].base_model_name_or_path = name or None
    gossamer.save_adapter(model, tmp_path / "adapter")
    card = (tmp_path / "adapter" / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    known = {"base_model": name} if name and "{" not in base else {}
    assert head == {"library_name": "peft", **known, "tags": ["lora", "gossamer"]}
    assert f'base="{shown}")' in card
    assert str(tmp_path) not in card


def test_what_lies_elsewhere_is_said(tmp_path: Path) -> None:
    (tmp_path / "blocks.safetensors").touch()
    with pytest.raises(GossamerError, match=f"adapters are in {tmp_path}/adapter"):
        gossamer.load_adapter(tmp_path, tiny_model("llama"))
    gossamer.save_adapter(adapted(), tmp_path / "adapter")
    with pytest.raises(GossamerError, match="does not say which dense model"):
        gossamer.load(tmp_path / "adapter")
    with pytest.raises(GossamerError, match=r"gossamer merge .* --model BASE"):
        gossamer.load_adapter(tmp_path / "adapter", str(tmp_path / "adapter"))


def test_a_base_in_another_precision_is_the_same_base(tmp_path: Path) -> None:
    gossamer.save_adapter(adapted(), tmp_path / "adapter")
    loaded = gossamer.load_adapter(tmp_path / "adapter", tiny_model("llama").bfloat16())
    assert loaded.model.embed_tokens.weight.dtype == torch.bfloat16
    assert gate_biases(loaded).dtype == torch.float32
    with torch.no_grad():
        assert loaded(input_ids=IDS).logits.isfinite().all()


def another(**changes) -> PreTrainedModel:
    config = tiny_config("llama")
    for key, value in changes.items():
        setattr(config, key, value)
    return AutoModelForCausalLM.from_config(config)


OTHERS = {
    "family": (lambda: tiny_model("qwen3"), "trained on a llama model, but the model given is a qwen3 model"),
    "vocabulary": (lambda: another(vocab_size=98), r"embed_tokens.weight has shape \[97, 32\]; .* of shape \[98, 32\]"),
    "fewer layers": (lambda: another(num_hidden_layers=2), r"layers\.2\..* it is missing"),
    "more layers": (lambda: another(num_hidden_layers=4), r"without model\.layers\.3\."),
    "heads": (lambda: another(num_attention_heads=8, head_dim=4, num_key_value_heads=4), "4 heads a layer; .* has 8"),
    "key/value heads": (lambda: another(num_key_value_heads=4), r"k_proj\.weight has shape \[16, 32\]"),
    "weights": (lambda: tiny_model("llama", seed=1), "is not the model that .* was trained on: its model.embed_tokens"),
    "gates": (lambda: gossamer.add_gates(tiny_model("llama")), "has gates or adapters already"),
    "adapters": (lambda: gossamer.remove_gates(adapted()), "has gates or adapters already"),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHERS)
def test_another_base_is_refused_in_one_line_and_left_alone(case: str, tmp_path: Path) -> None:
    gossamer.save_adapter(adapted(), tmp_path / "adapter")
    make, message = OTHERS[case]
    base = make()
    before = {key: value.clone() for key, value in base.state_dict().items()}
    with pytest.raises(GossamerError, match=message) as error:
        gossamer.load_adapter(tmp_path / "adapter", base, inplace=True)
    assert "\n" not in str(error.value)
    after = base.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_one_changed_weight_is_noticed(tmp_path: Path) -> None:
    gossamer.save_adapter(adapted(), tmp_path / "adapter")
    base = tiny_model("llama")
    base.model.layers[2].mlp.up_proj.weight.data.mul_(1.1)
    with pytest.raises(GossamerError, match=r"its model\.layers\.2\.mlp\.up_proj\.weight has other values"):
        gossamer.load_adapter(tmp_path / "adapter", base)


def test_samples_are_the_ends_of_a_weight_of_any_size_and_what_is_between() -> None:
    large = torch.empty(49152, 576)
    large[0, 0], large[-1, -1] = 1.0, 2.0
    found = samples({"ten": torch.arange(10.0).reshape(2, 5), "large": large, "one": torch.tensor([3.0])})
    assert found[0].tolist() == [0, 3, 6, 9]
    assert found[1, [0, -1]].tolist() == [1.0, 2.0]
    assert found[2].tolist() == [3.0] * SAMPLES


def test_only_gated_models_with_adapters_are_saved(tmp_path: Path) -> None:
    dense = tiny_model("llama")
    with pytest.raises(GossamerError, match="no adapters"):
        gossamer.save_adapter(gossamer.add_gates(dense), tmp_path / "adapter")
    add_adapters(dense, rank=2, alpha=4.0)
    with pytest.raises(GossamerError, match="no gates"):
        gossamer.save_adapter(dense, tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:500])


def rename_one(file: Path) -> None:
    tensors = load_file(file)
    key = min(tensors)
    save_file({**{k: v for k, v in tensors.items() if k != key}, f"{key}x": tensors[key]}, file, {"format": "pt"})


def narrow_one(file: Path) -> None:
    tensors = load_file(file)
    key = min(tensors)
    save_file({**tensors, key: tensors[key][:1, :1].contiguous()}, file, {"format": "pt"})


def describe(**changes: object) -> Callable[[Path], None]:
    """Change the description of the dense model in the file of gates; remove the metadata if there are no changes."""

    def harm(file: Path) -> None:
        with safe_open(file, "pt") as stream:
            described = {**json.loads(stream.metadata()["gossamer"]), **changes}
        save_file(load_file(file), file, {"gossamer": json.dumps(described)} if changes else {})

    return harm


def configure(**changes: object) -> Callable[[Path], None]:
    return lambda file: file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def no_number(file: Path) -> None:
    tensors = load_file(file)
    with safe_open(file, "pt") as stream:
        metadata = stream.metadata()
    tensors[min(tensors)].fill_(torch.nan)
    save_file(tensors, file, metadata)


DAMAGE = {
    "no gates": ("gossamer_gates.safetensors", Path.unlink, "holds no adapters that gossamer saved"),
    "no adapters": ("adapter_model.safetensors", Path.unlink, "it has no adapter_model.safetensors"),
    "no config": ("adapter_config.json", Path.unlink, "it has no adapter_config.json"),
    "cut gates": ("gossamer_gates.safetensors", cut, "gossamer_gates.safetensors cannot be used: cut short"),
    "cut adapters": ("adapter_model.safetensors", cut, "adapter_model.safetensors cannot be used: cut short"),
    "cut config": (
        "adapter_config.json",
        lambda f: f.write_text('{"peft_type": "LO'),
        "_config.json cannot be used: not",
    ),
    "other method": ("adapter_config.json", lambda f: f.write_text('{"peft_type": "IA3"}'), "IA3"),
    "other names": ("adapter_model.safetensors", rename_one, "adapter_config.json beside it cannot be used"),
    "no description": ("gossamer_gates.safetensors", describe(), "gates.safetensors cannot be used: it lacks"),
    "odd heads": ("gossamer_gates.safetensors", describe(heads="four"), "heads is 'four', not a whole number"),
    "odd shapes": ("gossamer_gates.safetensors", describe(base_shapes=[1]), "base_shapes is a list, not an object"),
    "odd family": ("gossamer_gates.safetensors", describe(base_model_type=None), "base_model_type is None, not a text"),
    "gates that are no numbers": ("gossamer_gates.safetensors", no_number, "has values that are not finite"),
    "adapters that are no numbers": ("adapter_model.safetensors", no_number, "has values that are not finite"),
    "a regular expression": (
        "adapter_config.json",
        configure(target_modules="(.*)*z"),
        "target_modules is .*, not a list",
    ),
    "regular expressions": (
        "adapter_config.json",
        configure(target_modules=["(.*)*z"]),
        "which is no name of a module",
    ),
    "another setting": ("adapter_config.json", configure(rank_pattern={"(.*)*z": 3}), "it sets rank_pattern"),
    "no alpha": ("adapter_config.json", configure(lora_alpha=float("nan")), "NaN is no number"),
    "odd alpha": ("adapter_config.json", configure(lora_alpha="x"), "lora_alpha is 'x', not a number"),
    "other shape": ("adapter_model.safetensors", narrow_one, "adapter_config.json beside it cannot be used"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_directories_are_named(case: str, tmp_path: Path) -> None:
    gossamer.save_adapter(adapted(), tmp_path / "adapter")
    name, harm, message = DAMAGE[case]
    harm(tmp_path / "adapter" / name)
    base = tiny_model("llama")
    with pytest.raises(GossamerError, match=message):
        gossamer.load_adapter(tmp_path / "adapter", base)
    assert set(base.state_dict()) == set(tiny_model("llama").state_dict())


def test_saving_again_replaces_the_whole_directory(tmp_path: Path) -> None:
    gossamer.save_adapter(adapted(), tmp_path / "adapter")
    (tmp_path / "adapter" / "stale").touch()
    gossamer.save_adapter(adapted(), tmp_path / "adapter")
    assert {file.name for file in (tmp_path / "adapter").iterdir()} == FILES
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
