"""The circuit of a model wired by hand (:mod:`induction`) is found."""

import pytest
import torch
from transformers import GPT2LMHeadModel

from gossamer.circuits.activation_cache import run_with_cache
from gossamer.circuits.graph import prune, top_edges
from gossamer.circuits.intervention import run_with_edges, run_with_links
from gossamer.circuits.metrics import measure_curve
from gossamer.circuits.scores import eap_ig_inputs, exact
from gossamer.circuits.search import find_circuits
from gossamer.circuits.streams import graph_of
from gossamer.circuits.tasks.base import Batch, Example, Prompts, TokenizedExample
from induction import SIZE, induction_model, induction_prompts


@pytest.fixture(scope="module")
def model() -> GPT2LMHeadModel:
    return induction_model()


@pytest.fixture(scope="module")
def batch() -> Batch:
    clean, corrupted, answers = zip(*induction_prompts(), strict=True)
    wrong = tuple(torch.tensor([token for token in range(SIZE) if token != answer]) for answer in answers)
    right = tuple(torch.tensor([answer]) for answer in answers)
    return Batch(torch.tensor(clean), torch.tensor(corrupted), right, wrong, "logit_difference")


TRUTH = {("input", "a0.h0<v>"), ("a0.h0", "a1.h0<k>"), ("a1.h0", "logits")}


def names(graph, edges: torch.Tensor) -> set[tuple[str, str]]:
    return {(graph.source_name(u), graph.destination_name(v)) for u, v in edges.nonzero().tolist()}


@torch.no_grad()
def test_the_wired_model_does_induction(model: GPT2LMHeadModel, batch: Batch) -> None:
    predicted = model(input_ids=batch.clean).logits[:, -1].argmax(-1)
    assert predicted.tolist() == [answer.item() for answer in batch.answers]


def test_the_circuit_is_found_exactly(model: GPT2LMHeadModel, batch: Batch) -> None:
    """EAP-IG finds it. EAP ranks a1.h0<v> above a1.h0<k>: the clean attention is saturated, its gradient near zero."""
    graph = graph_of(model)
    scores = eap_ig_inputs.edge_scores(model, batch, steps=5)
    assert names(graph, prune(graph, top_edges(graph, scores, 3))) == TRUTH
    assert names(graph, prune(graph, top_edges(graph, scores, 3, absolute=False))) == TRUTH


def test_the_circuit_alone_does_it_and_less_does_not(model: GPT2LMHeadModel, batch: Batch) -> None:
    graph = graph_of(model)
    scores = eap_ig_inputs.edge_scores(model, batch, steps=5)
    total = int(graph.possible().sum())

    def measure(sizes: list[int]) -> list[float]:
        circuits = torch.stack([top_edges(graph, scores, size) for size in sizes])
        return run_with_edges(model, batch, circuits).mean(1).tolist()

    curve = measure_curve(total, measure, rounds=6)
    assert curve.first_size == curve.lasting_size == 3
    found = next(point for point in curve.points if point.size == 3)
    assert found.faithfulness == pytest.approx(1.0, abs=1e-6)


def test_without_one_edge_of_the_circuit_nothing_is_left(model: GPT2LMHeadModel, batch: Batch) -> None:
    graph = graph_of(model)
    clean, corrupted = (run_with_edges(model, batch, kept).mean() for kept in (graph.possible(), ~graph.possible()))
    for u, v in top_edges(graph, eap_ig_inputs.edge_scores(model, batch, steps=5), 3).nonzero().tolist():
        kept = graph.possible()
        kept[u, v] = False
        left = (run_with_edges(model, batch, kept).mean() - corrupted) / (clean - corrupted)
        assert left.abs() < 1e-3


def test_the_links_of_the_circuit_suffice(model: GPT2LMHeadModel, batch: Batch) -> None:
    """Two of 84 allowed links carry the answer: B reads A in head 0.0, and the last A reads B in head 1.0."""
    weights = run_with_cache(model, batch.clean, links=True).weights
    assert (weights[0][:, 0, 3, 2] > 0.99).all()
    assert (weights[1][:, 0, 5, 3] > 0.9).all()
    kept = torch.zeros(len(batch.clean), 2, 2, 6, 6, dtype=torch.bool)
    corrupted = run_with_links(model, batch, kept)
    kept[:, 0, 0, 3, 2] = True
    kept[:, 1, 0, 5, 3] = True
    clean = run_with_links(model, batch, torch.ones_like(kept))
    share = (run_with_links(model, batch, kept) - corrupted) / (clean - corrupted)
    assert (share > 0.85).all()


def test_all_levels_are_searched_at_once(model: GPT2LMHeadModel, batch: Batch) -> None:
    rows = zip(batch.clean, batch.corrupted, batch.answers, batch.wrong, strict=True)
    kept = tuple(TokenizedExample(Example(str(i), "", ("",), ("",)), *row) for i, row in enumerate(rows))
    found = find_circuits(model, Prompts("logit_difference", kept, ()), batch_size=4)
    curves = found.curves
    assert {level: curve.total for level, curve in curves.items()} == {"nodes": 7, "edges": 46, "links": 84}
    assert curves["nodes"].first_size == 3
    assert curves["edges"].first_size == 3
    assert names(found.graph, found.edges(3)) == TRUTH
    assert curves["links"].first_size == 3  # the copying head's attention is only 0.9; the third link adds to it
    for batch, links in zip(found.batches, found.links(2), strict=True):
        wanted = torch.zeros_like(links)
        wanted[:, 0, 0, 3, 2] = True
        wanted[:, 1, 0, 5, 3] = True
        assert torch.equal(links, wanted)
        assert len(links) == len(batch.clean)


def test_units_that_help_most_are_the_circuit_too(model: GPT2LMHeadModel, batch: Batch) -> None:
    rows = zip(batch.clean, batch.corrupted, batch.answers, batch.wrong, strict=True)
    kept = tuple(TokenizedExample(Example(str(i), "", ("",), ("",)), *row) for i, row in enumerate(rows))
    found = find_circuits(model, Prompts("logit_difference", kept, ()), absolute=False, batch_size=4)
    assert {level: curve.first_size for level, curve in found.curves.items()} == {"nodes": 3, "edges": 3, "links": 3}
    assert names(found.graph, found.edges(3)) == TRUTH


def test_exact_patching_names_the_same_circuit(model: GPT2LMHeadModel, batch: Batch) -> None:
    graph = graph_of(model)
    edges = exact.edge_scores(model, batch)
    assert names(graph, edges.abs() > 1e-3) == TRUTH
    nodes = exact.node_scores(model, batch)
    assert {graph.source_name(node) for node in (nodes.abs() > 1e-3).nonzero()[:, 0].tolist()} == {
        "input", "a0.h0", "a1.h0"
    }  # fmt: skip
    links = exact.link_scores(model, batch)
    strongest = links.flatten(1).abs().topk(2).indices
    for row in strongest:
        found = {tuple(int(x) for x in torch.unravel_index(place, links.shape[1:])) for place in row}
        assert found == {(0, 0, 3, 2), (1, 0, 5, 3)}
