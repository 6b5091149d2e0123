"""A model wired by hand, so that its circuit is known: induction by a previous-token head and a copying head.

The stream is four blocks of eight dimensions: token, position, token before, answer. Head 0.0 finds the position
before (q: position, k: position + 1) and moves its token to "token before"; head 1.0 finds where the present token
stood before (q: token, k: token before) and moves that place's token to "answer", which the unembedding reads. Heads
0.1 and 1.1 and the MLPs add nothing.
"""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from gossamer.circuits.activation_cache import run_with_cache
from gossamer.circuits.graph import prune, top_edges
from gossamer.circuits.intervention import run_with_edges, run_with_links
from gossamer.circuits.metrics import measure_curve
from gossamer.circuits.scores import eap_ig_inputs, exact
from gossamer.circuits.search import find_circuits
from gossamer.circuits.streams import graph_of
from gossamer.circuits.tasks.base import Batch, Example, Prompts, TokenizedExample

SIZE = 8
TOKEN, POSITION, BEFORE, ANSWER = (slice(SIZE * block, SIZE * (block + 1)) for block in range(4))
HEAD = 2 * SIZE


@pytest.fixture(scope="module")
def model() -> GPT2LMHeadModel:
    width = 4 * SIZE
    config = GPT2Config(
        vocab_size=SIZE, n_positions=SIZE, n_embd=width, n_layer=2, n_head=2, tie_word_embeddings=False,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).double().eval()
    eye, ahead = torch.eye(SIZE), torch.eye(SIZE).roll(1, 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if ".ln_" in name and name.endswith("weight") else 0.0)
        transformer = model.transformer
        transformer.wte.weight[:, TOKEN] = eye
        transformer.wpe.weight[:, POSITION] = eye
        model.lm_head.weight[:, ANSWER] = eye
        reads = (((POSITION, 12 * eye), (POSITION, 12 * ahead), (TOKEN, eye)),
                 ((TOKEN, 12 * eye), (BEFORE, 12 * eye), (TOKEN, eye)))  # fmt: skip
        for block, read, write in zip(transformer.h, reads, (BEFORE, ANSWER), strict=True):
            for kind, (source, matrix) in enumerate(read):
                start = kind * width
                block.attn.c_attn.weight[source, start : start + SIZE] = matrix.double()
            block.attn.c_proj.weight[:SIZE, write] = eye.double()
    return model


def prompts(count: int = 6) -> list[tuple[list[int], list[int], int]]:
    """0 x A B y A, where B has to follow; corrupted: the first A is another token, and nothing has to follow."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(count):
        x, a, b, y, other = (1 + torch.randperm(SIZE - 1, generator=generator)[:5]).tolist()
        rows.append(([0, x, a, b, y, a], [0, x, other, b, y, a], b))
    return rows


@pytest.fixture(scope="module")
def batch() -> Batch:
    clean, corrupted, answers = zip(*prompts(), strict=True)
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
    """By EAP-IG. EAP ranks a1.h0<v> above a1.h0<k>: the clean run's attention is saturated, its gradient near zero."""
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
    """Of 84 allowed links two carry it: B reads A in head 0.0, the last A reads B in head 1.0."""
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
    assert curves["links"].first_size == 3  # the copying head's attention is 0.9, the third link a part of the rest
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
