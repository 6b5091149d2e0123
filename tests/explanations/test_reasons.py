"""Gate logits split by writers: exact in every family; tests of writers are compared with runs of the model."""

import pytest
import torch
from torch import nn

import gossamer
from families import CONFIGS, tiny_model
from gossamer.circuits.streams import Pattern, StreamHooks, stream_hooks
from gossamer.errors import GossamerError
from gossamer.explanations.reasons import BIASES, GateSplitter, fixed_norms
from gossamer.models.architectures import attention_modules

IDS = tuple(range(5, 14))
LINKS = [(head, query, key) for head in (0, 3) for query, key in ((8, 8), (8, 6), (5, 2))]


class Logits(StreamHooks):
    """Records the attention logits before softcap, by layer."""

    def __init__(self, change=None) -> None:
        self.found: list[torch.Tensor] = []
        self.change = change

    def read_attention(self, layer, x, norm):
        return x if self.change is None or self.change[0] != layer else x + self.change[1]

    def attend(self, layer, q, k, v, pattern: Pattern):
        self.found.append(q[0] @ k[0].mT * pattern.scale)
        return super().attend(layer, q, k, v, pattern)


@torch.no_grad()
def logits_of(model, change=None) -> list[torch.Tensor]:
    hooks = Logits(change)
    with stream_hooks(model, hooks):
        model(input_ids=torch.tensor([IDS]), use_cache=False)
    return hooks.found


def gated(family: str):
    return gossamer.add_gates(tiny_model(family), gate_bias=0.5).eval().requires_grad_(False)


@pytest.mark.parametrize("family", CONFIGS)
def test_parts_add_up_to_the_logit(family: str) -> None:
    """The biases' part does not hide a remainder: without biases in the model it is 0."""
    model = gated(family)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") and "gate" not in name:
            parameter.zero_()
    splitter, wanted = GateSplitter(model, IDS), logits_of(model)
    for layer in range(3):
        for split in splitter.split(layer, LINKS):
            _, head, query, key = split.link
            logit = wanted[layer][head, query, key].item()
            assert split.logit == pytest.approx(logit, abs=1e-4)
            assert split.parts.sum().item() == pytest.approx(logit, abs=1e-4)
            assert split.writers[-1] == BIASES
            assert split.parts[:-1, :-1].sum().item() == pytest.approx(logit, abs=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "qwen2", "opt"])
def test_biases_are_a_writer_of_their_own(family: str) -> None:
    model = gated(family)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") and "gate" not in name:
            parameter.add_(torch.linspace(-0.5, 0.5, parameter.numel()).view_as(parameter))
    wanted = logits_of(model)
    for split in GateSplitter(model, IDS).split(1, LINKS):
        _, head, query, key = split.link
        assert split.parts.sum().item() == pytest.approx(wanted[1][head, query, key].item(), abs=1e-4)
        assert split.parts[-1].abs().max() > 1e-3


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "gemma2", "olmo2", "granite"])
def test_a_writer_is_tested_by_running_the_model_without_it(family: str) -> None:
    model = gated(family)
    splitter = GateSplitter(model, IDS)
    bias = list(attention_modules(model))[1].gate_bias
    (reason,) = splitter.explain([(1, 3, 8, 6)])
    (split,) = splitter.split(1, [(3, 8, 6)])
    assert len(reason.tests) == 6
    for test in reason.tests:
        writer = split.writers.index(test.writer)
        totals = split.parts.sum(1 if test.side == "query" else 0)
        assert test.part == pytest.approx(totals[writer].item())
        assert test.gate_fixed == pytest.approx(split.gate(split.logit - test.part))
        change = torch.zeros(1, len(IDS), 32)
        position = 8 if test.side == "query" else 6
        change[0, position] = -splitter.cache.written[writer, 0, position]
        logit = logits_of(model, (1, change))[1][3, 8, 6].item()
        assert test.gate_recomputed == pytest.approx(split.gate(logit), abs=1e-4)
    assert reason.gate == pytest.approx(split.gate(split.logit))
    softcap = getattr(model.config, "attn_logit_softcapping", None)
    logit = torch.tensor(split.logit)
    capped = logit if softcap is None else softcap * torch.tanh(logit / softcap)
    assert reason.gate == pytest.approx((capped + bias[3]).item(), abs=1e-5)
    assert reason.pairs[0][2] == pytest.approx(split.parts.flatten()[split.parts.abs().argmax()].item())


def test_a_dense_model_has_parts_and_nothing_to_close() -> None:
    model = tiny_model("llama").eval().requires_grad_(False)
    (reason,) = GateSplitter(model, IDS).explain([(2, 0, 8, 3)])
    assert reason.tests == ()
    assert reason.gate == pytest.approx(logits_of(model)[2][0, 8, 3].item(), abs=1e-5)


def test_a_norm_that_is_neither_kind_is_refused() -> None:
    class CubeNorm(nn.Module):
        eps = 1e-6

        def forward(self, x):
            return x**3

    model = gated("llama")
    model.model.layers[1].input_layernorm = CubeNorm()
    with pytest.raises(GossamerError, match="CubeNorm is neither an RMSNorm nor a LayerNorm"):
        GateSplitter(model, IDS).split(1, LINKS)
    with fixed_norms(model, 0):
        model(input_ids=torch.tensor([IDS]))
