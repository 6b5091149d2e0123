"""Coordinates of open links, compared with the definition and with the gates of the op itself."""

import pytest
import torch

from attention_cases import FAST, GROUPS, PADDING, inputs
from gossamer import OpenLinks, gated_attention, open_links


def links_of(implementation: str, tokens: int = 97, **options) -> tuple[dict[str, torch.Tensor], OpenLinks]:
    tensors = inputs(tokens, implementation=implementation)
    q, k, bias = tensors["q"], tensors["k"], tensors["gate_bias"]
    moved = {key: x.to(q.device) if isinstance(x, torch.Tensor) else x for key, x in options.items()}
    return tensors, open_links(q, k, bias, implementation=implementation, **moved)


@pytest.mark.parametrize("case", ["plain", *PADDING])
@pytest.mark.parametrize("implementation", FAST)
def test_links_are_those_of_the_definition(implementation: str, case: str) -> None:
    options = PADDING.get(case, {})
    _, found = links_of(implementation, **options)
    _, wanted = links_of("naive", **options)
    assert torch.equal(found.counts.cpu(), wanted.counts)
    assert torch.equal(found.pairs.cpu(), wanted.pairs)
    torch.testing.assert_close(found.weights.cpu(), wanted.weights, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", FAST)
def test_links_rebuild_the_output(implementation: str) -> None:
    tensors, links = links_of(implementation)
    result = gated_attention(**tensors, implementation=implementation)
    assert torch.equal(links.counts, result.open_links.sum(-1))
    batch, heads, tokens, _ = tensors["q"].shape
    pattern = torch.zeros(batch * heads, tokens, tokens, device=links.weights.device)
    pattern[links.head, links.query, links.key] = links.weights
    values = tensors["v"].repeat_interleave(GROUPS, dim=1).flatten(0, 1).float()
    torch.testing.assert_close((pattern @ values).view_as(result.output), result.output.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", FAST)
def test_links_of_one_head(implementation: str) -> None:
    _, links = links_of(implementation)
    own = links.of(1, 2)
    mine = links.head == 1 * links.counts.shape[1] + 2
    assert len(own.pairs) == links.counts[1, 2] > 0
    assert torch.equal(own.query, links.query[mine])
    assert torch.equal(own.key, links.key[mine])
    assert torch.equal(own.weights, links.weights[mine])


@pytest.mark.parametrize("implementation", FAST)
def test_no_open_gate_no_link(implementation: str) -> None:
    tensors = inputs(20, implementation=implementation)
    shut = torch.full_like(tensors["gate_bias"], -torch.inf)
    links = open_links(tensors["q"], tensors["k"], shut, implementation=implementation)
    assert len(links.pairs) == len(links.weights) == links.counts.sum() == 0


@pytest.mark.parametrize("implementation", FAST)
def test_a_link_too_light_for_float32_is_still_a_link(implementation: str) -> None:
    tensors = inputs(20, implementation=implementation)
    heavy = tensors["k"].detach().clone()
    heavy[:, :, 0] *= 1e4
    bias = torch.full_like(tensors["gate_bias"], 1e6)
    links = open_links(tensors["q"], heavy, bias, implementation=implementation)
    assert (links.counts == 20 * 21 // 2).all()
    assert (links.weights == 0).any()


def test_positions_beyond_16_bits_keep_their_bits() -> None:
    pairs = torch.tensor([(65_535 << 16 | 65_534) - (1 << 32), 40_000 << 16 | 5], dtype=torch.int64).to(torch.int32)
    links = OpenLinks(torch.tensor([[2]]), pairs, torch.ones(2))
    assert links.query.tolist() == [65_535, 40_000]
    assert links.key.tolist() == [65_534, 5]


def test_too_many_keys_are_refused() -> None:
    q = torch.zeros(1, 1, 1, 2)
    with pytest.raises(ValueError, match="70000 keys"):
        open_links(q, torch.zeros(1, 1, 70_000, 2), torch.zeros(1))
