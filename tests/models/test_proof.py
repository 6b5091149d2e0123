"""An unlisted family: recognised by the names of its modules, and tested by running it before gates are added."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

import gossamer
from families import GROUPED, tokens
from gossamer.circuits.activation_cache import run_with_cache
from gossamer.errors import GossamerError
from gossamer.models.architectures import PROVEN


class OddConfig(LlamaConfig):
    model_type = "odd"


class OddForCausalLM(LlamaForCausalLM):
    config_class = OddConfig


@pytest.fixture
def odd(monkeypatch: pytest.MonkeyPatch):
    """A model of an unknown family."""
    mapping = AutoModelForCausalLM._model_mapping
    monkeypatch.setattr(mapping, "_extra_content", {**mapping._extra_content, OddConfig: OddForCausalLM})
    torch.manual_seed(0)
    model = OddForCausalLM._from_config(OddConfig(**GROUPED), attn_implementation="eager").eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    return model


@torch.no_grad()
def test_an_unknown_family_with_known_parts_is_proven_and_gated(odd: LlamaForCausalLM) -> None:
    assert "odd" not in PROVEN
    gated = gossamer.add_gates(odd)
    with gossamer.forced_open(gated):
        torch.testing.assert_close(gated(input_ids=tokens(1, 9)).logits, odd(input_ids=tokens(1, 9)).logits)
    cache = run_with_cache(gated, tokens(2, 6))
    torch.testing.assert_close(cache.written.sum(0), cache.read["logits", 0])


class Rescaled(LlamaAttention):
    """Attention with a different scale when it is gated."""

    def forward(self, *args, **kwargs):
        self.scaling = 1.0 if self.config._attn_implementation == "gossamer" else 0.1
        return super().forward(*args, **kwargs)  # which goes through ALL_ATTENTION_FUNCTIONS


def test_a_family_that_is_not_right_with_gates_is_refused_and_left_alone(odd: LlamaForCausalLM) -> None:
    for layer in odd.model.layers:
        layer.self_attn.__class__ = Rescaled
    before = set(odd.state_dict())
    with pytest.raises(GossamerError, match="odd computes something else when all its gates are open"):
        gossamer.add_gates(odd, inplace=True)
    assert set(odd.state_dict()) == before
    assert odd.config._attn_implementation == "eager"
    assert not gossamer.is_gated(odd)


class Remembering(LlamaAttention):
    """Attention that doubles its input when there is a cache."""

    def forward(self, hidden_states, *args, **kwargs):
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        if cache is not None and cache.get_seq_length(self.layer_idx):
            hidden_states = hidden_states * 2
        return super().forward(hidden_states, *args, **kwargs)  # ALL_ATTENTION_FUNCTIONS


def test_a_family_that_is_not_the_same_from_a_cache_is_refused(odd: LlamaForCausalLM) -> None:
    for layer in odd.model.layers:
        layer.self_attn.__class__ = Remembering
    with pytest.raises(GossamerError, match="odd computes something else from a cache"):
        gossamer.add_gates(odd)


@torch.no_grad()
def test_a_stream_with_another_writer_is_refused_when_it_is_split(odd: LlamaForCausalLM) -> None:
    gated = gossamer.add_gates(odd)
    gated.model.layers[0].register_forward_hook(lambda _, args, output: output + 0.5 * args[0])
    with pytest.raises(GossamerError, match="heads and MLPs of odd are not all that writes"):
        run_with_cache(gated, tokens(2, 6))


def test_a_layer_with_an_unknown_part_is_not_taken_apart(odd: LlamaForCausalLM) -> None:
    for layer in odd.model.layers:
        layer.extra = nn.Linear(32, 32)
    gated = gossamer.add_gates(odd)
    with pytest.raises(GossamerError, match="odd has layers with parts that gossamer does not know: extra"):
        run_with_cache(gated, tokens(2, 6))
