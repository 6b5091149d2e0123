"""The expected open fraction under both weightings, and its logarithm for any division of a step."""

import pytest
import torch

import gossamer
from families import tiny_model, tokens
from gossamer.models.attention import LinkCounts
from gossamer.training.objective import expected_open_fraction


def counts_of(expected: list[float], allowed: list[int]) -> LinkCounts:
    """Create the counts of one sequence and one head."""
    links = torch.tensor([[allowed]])
    return LinkCounts(torch.tensor([[expected]]), links, links, links.float())


def test_each_weighting_by_hand() -> None:
    counts = {0: counts_of([0.5, 0.5, 1.5], [1, 2, 3]), 1: counts_of([1.0, 0.0, 0.0], [1, 2, 0])}
    assert expected_open_fraction(counts, "links").item() == pytest.approx(3.5 / 9)
    # The last query of layer 1 is padding: it has no allowed key and does not count.
    assert expected_open_fraction(counts, "queries").item() == pytest.approx((0.5 + 0.25 + 0.5 + 1.0 + 0.0) / 5)


@pytest.mark.parametrize("weighting", ["links", "queries"])
def test_the_gradient_of_the_logarithm_does_not_depend_on_how_a_step_is_divided(weighting: str) -> None:
    model = gossamer.add_gates(tiny_model("llama"))
    ids = tokens(4, 12)
    biases = [module.self_attn.gate_bias for module in model.model.layers]

    def fraction(rows: torch.Tensor) -> torch.Tensor:
        with gossamer.counted_links(model) as counts:
            model(input_ids=rows)
        return expected_open_fraction(counts, weighting)

    whole = fraction(ids)
    wanted = torch.autograd.grad(whole.log(), biases)
    parts = torch.autograd.grad(sum(fraction(row) / whole.item() for row in ids.split(1)) / 4, biases)
    for found, right in zip(parts, wanted, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-7)
