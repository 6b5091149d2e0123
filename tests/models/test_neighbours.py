"""Gated models compute the same inside TransformerLens and nnsight as outside."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

import gossamer
from families import CONFIGS, tiny_model, tokens
from gossamer import GossamerError
from gossamer.models.architectures import attention_modules
from gossamer.models.transformer_lens import gate_bridge, gated_bridge

needs_nnsight = pytest.mark.skipif(importlib.util.find_spec("nnsight") is None, reason="nnsight is not installed")
needs_transformer_lens = pytest.mark.skipif(
    importlib.util.find_spec("transformer_lens") is None, reason="transformer-lens is not installed"
)


def gated_model(name: str) -> PreTrainedModel:
    """Create a gated model with biases of both signs."""
    model = gossamer.add_gates(tiny_model(name))
    for module in attention_modules(model):
        module.gate_bias.data = torch.tensor([0.5, -0.3, 0.0, 1.0])
    return model


@torch.no_grad()
@needs_transformer_lens
@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "opt"])
def test_a_gated_bridge_says_what_the_model_says(name: str) -> None:
    model = gated_model(name)
    bridge = gated_bridge(model)
    ids = tokens(2, 14)
    wanted = model(input_ids=ids).logits
    found = bridge(ids, return_type="logits")
    assert (wanted - gossamer.remove_gates(model)(input_ids=ids).logits).abs().max() > 0.1
    assert (found - wanted).abs().max() < 1e-5 * max(1.0, wanted.abs().max())


@torch.no_grad()
@needs_transformer_lens
def test_gates_in_a_bridge_can_be_taken_out_again() -> None:
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    model = gated_model("llama")
    dense = gossamer.remove_gates(model)
    ids = tokens(2, 14)
    bridge = build_bridge_from_module(gossamer.remove_gates(model), "LlamaForCausalLM", hf_config=dense.config)
    sparse_logits, dense_logits = model(input_ids=ids).logits, dense(input_ids=ids).logits

    def says(wanted: torch.Tensor) -> bool:
        return torch.allclose(bridge(ids, return_type="logits"), wanted, rtol=0, atol=1e-4)

    gates = gate_bridge(bridge, model)
    bridge.reset_hooks()
    assert says(sparse_logits)
    gates.remove()
    assert says(dense_logits)
    with gate_bridge(bridge, model):
        assert says(sparse_logits)
    assert says(dense_logits)


@torch.no_grad()
@needs_transformer_lens
def test_the_pattern_that_users_see_is_gated_and_follows_their_edits_of_the_scores() -> None:
    model = gated_model("gpt2")
    bridge = gated_bridge(model)
    ids = tokens(1, 10)
    with gossamer.counted_links(model) as counts:
        model(input_ids=ids)
    _, cache = bridge.run_with_cache(ids)
    for layer in range(3):
        pattern = cache["pattern", layer]
        opened = counts[layer].open_links
        assert torch.equal((pattern > 0).sum(-1), opened)
        assert (pattern.sum(-1) < 0.999).any()

    def far_below(scores: torch.Tensor, hook: object) -> torch.Tensor:
        return scores - 1e4  # the softmax does not change, but every gate closes

    patterns = []
    hooks = [
        ("blocks.1.attn.hook_attn_scores", far_below),
        ("blocks.1.attn.hook_pattern", lambda pattern, hook: patterns.append(pattern)),
    ]
    bridge.run_with_hooks(ids, fwd_hooks=hooks)
    assert patterns[0].abs().max() == 0


@torch.no_grad()
@needs_transformer_lens
def test_a_bridge_that_says_something_else_is_refused() -> None:
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    model = gated_model("gpt2")
    ids = tokens(1, 10)
    wanted = model(input_ids=ids).logits.log_softmax(-1)
    bridge = gated_bridge(model)
    bridge.enable_compatibility_mode(disable_warnings=True, fold_value_biases=False)
    torch.testing.assert_close(bridge(ids, return_type="logits").log_softmax(-1), wanted, rtol=0, atol=1e-4)
    for module in attention_modules(model):
        module.c_attn.bias.data.normal_()
    folded = gated_bridge(model)
    folded.enable_compatibility_mode(disable_warnings=True)
    with pytest.raises(GossamerError, match="fold_value_biases=False"):
        folded(ids, return_type="logits")
    other = tiny_model("gpt2", seed=1)
    with pytest.raises(GossamerError, match="differ by"):
        gate_bridge(build_bridge_from_module(other, "GPT2LMHeadModel", hf_config=other.config), model)
    with pytest.raises(GossamerError, match="cannot be gated"):
        gated_bridge(gated_model("opt"))
    with pytest.raises(GossamerError, match="no gates"):
        gated_bridge(tiny_model("gpt2"))


@torch.no_grad()
@needs_transformer_lens
@pytest.mark.parametrize(
    "cache",
    [
        False,
        pytest.param(
            True, marks=pytest.mark.xfail(strict=True, reason="TransformerLens 4.3.0 with transformers 5.24: dense too")
        ),
    ],
)
def test_a_bridge_with_a_tokenizer_generates_what_the_model_generates(
    saved_llama: Path, tokenizer, cache: bool
) -> None:
    model = gated_model("llama")
    with pytest.raises(GossamerError, match="save this one"):
        gated_bridge(model, tokenizer)
    bridge = gated_bridge(model, AutoTokenizer.from_pretrained(saved_llama))
    prompt = "the sparse model reads"
    ids = bridge.to_tokens(prompt)
    wanted = model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    found = bridge.generate(
        ids, max_new_tokens=6, do_sample=False, stop_at_eos=False, verbose=False, use_past_kv_cache=cache
    )
    assert found.tolist() == wanted.tolist()


NNSIGHT_LAYERS = {"llama": "model.layers.1", "gpt2": "transformer.h.1"}


@needs_nnsight
@pytest.mark.parametrize("name", NNSIGHT_LAYERS)
def test_nnsight_traces_a_gated_model_as_it_is(name: str) -> None:
    from nnsight import NNsight

    model = gated_model(name)
    ids = tokens(2, 14)
    with torch.no_grad():
        wanted = model(input_ids=ids, output_hidden_states=True)
    traced = NNsight(model)
    layer = traced.get(NNSIGHT_LAYERS[name])
    with torch.no_grad(), traced.trace(ids):
        state = layer.output.save()
        logits = traced.output.logits.save()
    state = state[0] if isinstance(state, tuple) else state
    assert torch.equal(state, wanted.hidden_states[2])
    assert torch.equal(logits, wanted.logits)


@needs_nnsight
def test_nnsight_does_not_hide_public_names() -> None:
    """nnsight adds ``save`` to every object, and modules find it before their own ``__getattr__``."""
    script = (
        "import nnsight, torch\n"
        "with nnsight.NNsight(torch.nn.Linear(2, 2)).trace(torch.zeros(1, 2)): pass\n"
        "import gossamer\n"
        "print(gossamer.save.__module__, gossamer.load.__module__)"
    )
    done = subprocess.run([sys.executable, "-c", script], env=os.environ, capture_output=True, text=True)
    assert done.stdout.split() == ["gossamer.models.checkpoint"] * 2, done.stderr
