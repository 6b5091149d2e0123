"""Links inside circuits of nodes, compared with the models' attention weights."""

import pytest
import torch

from circuit_cases import batch_of, model_of
from gossamer.circuits.activation_cache import run_with_cache
from gossamer.circuits.graph import Graph
from gossamer.circuits.links_inside import links_inside, links_of_heads
from gossamer.circuits.metrics import measure_curve
from gossamer.circuits.search import Circuits
from gossamer.circuits.tasks.base import Example, Prompts, TokenizedExample


def prompts_of(lengths: tuple[int, ...]) -> Prompts:
    kept = []
    for seed, length in enumerate(lengths):
        batch = batch_of(seed + 1, length)
        parts = (batch.clean[seed], batch.corrupted[seed], batch.answers[seed], batch.wrong[seed])
        kept.append(TokenizedExample(Example("", "", ("a",), ("b",)), *parts))
    return Prompts("logit_difference", tuple(kept), ())


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_heads_have_the_links_that_carry_something(family: str) -> None:
    dense, sparse, prompts = model_of(family), model_of(family, gated=True), prompts_of((4, 9, 9, 6))
    found = links_of_heads(sparse, prompts, 2)
    for name, model in (("dense", dense), ("sparse", sparse)):
        wanted = torch.zeros_like(found[name])
        for each in prompts.kept:
            weights = torch.stack(list(run_with_cache(model, each.clean[None], links=True).weights))
            wanted += (weights[:, 0] > 0).sum((-1, -2)) / len(prompts.kept)
        torch.testing.assert_close(found[name], wanted)
    assert (found["sparse"] < found["dense"]).any()


def test_inside_are_the_links_of_the_heads_that_are_kept() -> None:
    graph = Graph(2, 3)
    scores = torch.zeros(graph.sources)
    kept = [graph.head(0, 2), graph.mlp(0), graph.head(1, 0)]
    scores[kept] = torch.tensor([3.0, 2.0, -1.0])
    curve = measure_curve(graph.sources, lambda sizes: [float(size >= 3) for size in sizes])
    found = Circuits(graph, {"nodes": curve}, torch.zeros(0, 0), scores, (), (), True)
    assert curve.first_size == 3
    assert links_inside(found, torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])) == 4 + 8
