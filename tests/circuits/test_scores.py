"""All registered scores; those with their own definition are compared with it."""

import inspect

import pytest
import torch
from torch import Tensor

from circuit_cases import batch_of, model_of, near
from gossamer.circuits import mask_search
from gossamer.circuits.ablations import ABLATIONS
from gossamer.circuits.activation_cache import run_with_cache, source_outputs
from gossamer.circuits.graph import Graph
from gossamer.circuits.intervention import run_with_edges, run_with_nodes
from gossamer.circuits.scores import SCORES, eap_ig_activations, exact, find_score
from gossamer.circuits.scores.base import Score
from gossamer.circuits.search import find_circuits
from gossamer.circuits.streams import graph_of
from gossamer.circuits.tasks.base import Batch, Prompts
from gossamer.errors import GossamerError


def edge_scores(score: Score, model, batch: Batch, ablation: str) -> Tensor:
    if score.search is None:
        return score.edges(model, batch, ablation=ablation)
    return score.search(model, [batch], "edges", ablation=ablation, means={}, progress=lambda what: None)[0]


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("name", "family"),
    [(name, family) for name in SCORES for family in (["gpt2", "gpt_neox", "gemma2"] if "eap" in name else ["gpt2"])],
)
def test_a_score_is_of_units_that_there_are(
    name: str, family: str, gated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mask_search, "STEPS", 5)
    model, batch, score = model_of(family, gated), batch_of(2, 4), SCORES[name]
    graph = graph_of(model)
    for ablation in ABLATIONS:
        edges = edge_scores(score, model, batch, ablation)
        assert edges.shape == (graph.sources, graph.destinations)
        assert edges.isfinite().all()
        assert edges[graph.possible()].any()
        assert not edges[~graph.possible()].any()
    if score.nodes is not None:
        assert score.nodes(model, batch).shape == (graph.sources,)
    if score.links is not None:
        links = score.links(model, batch, ablation="zero")
        assert links.shape == (2, graph.layers, graph.heads, 4, 4)
        assert links.tril().any()
        assert not links.triu(1).any()


def test_the_command_line_names_every_score() -> None:
    from gossamer.cli.circuits import circuits

    said = inspect.signature(circuits).parameters["score"].annotation.__metadata__[0].help
    assert all(name in said for name in SCORES)


def test_a_score_without_links_is_refused_for_them() -> None:
    with pytest.raises(GossamerError, match="eap-ig-activations is not defined for links"):
        find_circuits(model_of("gpt2"), Prompts("logit_difference", (), ()), score=SCORES["eap-ig-activations"])


def test_an_unknown_score_is_refused_by_name() -> None:
    with pytest.raises(GossamerError, match="no score 'eapig'; there are eap-ig-inputs"):
        find_score("eapig")


@pytest.mark.parametrize("ablation", ["patch", "zero"])
def test_activations_are_interpolated_block_by_block(ablation: str) -> None:
    """Compared with hooks on GPT-2's modules, at the destinations with one gradient each: MLPs and logits."""
    steps, model, batch = 3, model_of("gpt2"), batch_of(3, 6)
    graph = graph_of(model)
    clean, other = source_outputs(model, batch.clean), source_outputs(model, batch.corrupted)
    if ablation == "zero":
        other = torch.zeros_like(other)
    blocks = [(model.transformer.drop, slice(0, 1))]
    for layer, block in enumerate(model.transformer.h):
        mlp = graph.mlp(layer)
        blocks += [(block.attn, slice(graph.head(layer, 0), mlp)), (block.mlp, slice(mlp, mlp + 1))]
    wanted = torch.zeros(graph.sources, graph.destinations, dtype=clean.dtype)
    for module, sources in blocks:
        for step in range(1, steps + 1):
            change = (1 - step / steps) * (other - clean)[sources].sum(0)
            for destination, gradient in gradients_with(model, batch, graph, module, change).items():
                sums = ((other - clean) * gradient).flatten(1).sum(1)
                sums[graph.sources_of(destination) :] = 0
                wanted[:, destination] += sums / (steps * len(blocks))
    scores = eap_ig_activations.edge_scores(model, batch, ablation=ablation, steps=steps)
    columns = [*(graph.read(layer, "mlp") for layer in range(graph.layers)), graph.logits]
    near(scores[:, columns], wanted[:, columns], 1e-6)


def gradients_with(model, batch: Batch, graph: Graph, module, change: Tensor) -> dict[int, Tensor]:
    """Compute the gradients at the inputs of MLPs and logits when ``change`` is added to a module's output."""
    read: dict[int, Tensor] = {}

    def keep(destination: int):
        def hook(_, inputs):
            read[destination] = inputs[0].clone().requires_grad_() if not inputs[0].requires_grad else inputs[0].clone()
            read[destination].retain_grad()
            return (read[destination], *inputs[1:])

        return hook

    def add(_, __, output):
        return (output[0] + change, *output[1:]) if isinstance(output, tuple) else output + change

    handles = [module.register_forward_hook(add)]
    for layer, block in enumerate(model.transformer.h):
        handles.append(block.ln_2.register_forward_pre_hook(keep(graph.read(layer, "mlp"))))
    handles.append(model.transformer.ln_f.register_forward_pre_hook(keep(graph.logits)))
    batch.measure(model(input_ids=batch.clean).logits[:, -1]).sum().backward()
    for handle in handles:
        handle.remove()
    model.zero_grad()
    return {destination: x.grad for destination, x in read.items()}


@pytest.mark.parametrize("ablation", ["zero", "mean"])
def test_exact_scores_ablate_one_unit_alone(ablation: str) -> None:
    model, batch = model_of("gpt2", gated=True), batch_of(2, 4)
    graph = graph_of(model)
    other = run_with_cache(model, batch.corrupted)
    edges, nodes = graph.possible(), torch.ones(graph.sources, dtype=torch.bool)
    scores = exact.edge_scores(model, batch, ablation=ablation), exact.node_scores(model, batch, ablation=ablation)
    clean = run_with_edges(model, batch, edges, ablation=ablation, other=other).sum()
    for source, destination in edges.nonzero()[::31].tolist():
        kept = edges.clone()
        kept[source, destination] = False
        without = run_with_edges(model, batch, kept, ablation=ablation, other=other).sum()
        near(scores[0][source, destination], without - clean, 1e-6)
    for source in range(graph.sources):
        kept = nodes.clone()
        kept[source] = False
        near(scores[1][source], run_with_nodes(model, batch, kept, ablation=ablation, other=other).sum() - clean, 1e-6)
