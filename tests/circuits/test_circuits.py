"""Scores compared with actual interpolation of edges, and interventions with equivalent runs, on tiny random models."""

import pytest
import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from circuit_cases import STRUCTURES, batch_of, metric, model_of, near
from families import tokens
from gossamer.circuits.ablations import ABLATIONS
from gossamer.circuits.activation_cache import run_with_cache
from gossamer.circuits.graph import Graph, prune, prune_links, top_edges
from gossamer.circuits.intervention import PatchedEdges, run_with_edges, run_with_links, run_with_nodes
from gossamer.circuits.projections import projections_of
from gossamer.circuits.scores import SCORES, eap, eap_ig_inputs, exact
from gossamer.circuits.search import faithfulness_of, find_circuits, mean_source_outputs
from gossamer.circuits.streams import StreamHooks, graph_of, stream_hooks
from gossamer.circuits.tasks.base import Batch, Example, Prompts, TokenizedExample


class Interpolated(PatchedEdges):
    """Patched edges that autograd can differentiate."""

    def _write(self, sources: slice, values: torch.Tensor) -> None:
        rows = values.unflatten(1, self.change.shape[1:3]) - self.replacement[sources, None]
        self.change = torch.cat((self.change[: sources.start], rows, self.change[sources.stop :]))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("family", STRUCTURES)
def test_eap_is_the_derivative_of_interpolating_each_edge(family: str, gated: bool) -> None:
    model, batch = model_of(family, gated), batch_of()
    graph = graph_of(model)
    scores = eap.edge_scores(model, batch)
    other = run_with_cache(model, batch.corrupted)
    kept = graph.possible().double().requires_grad_()
    hooks = Interpolated(graph, projections_of(model), kept[None], other, "patch")
    with stream_hooks(model, hooks):
        batch.measure(model(input_ids=batch.clean).logits[:, -1]).sum().backward()
    near(scores, -kept.grad)
    assert not scores[~graph.possible()].any()


@pytest.mark.parametrize("ablation", ["zero", "mean"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_scores_are_of_the_ablation_that_is_asked_for(family: str, ablation: str) -> None:
    model, batch = model_of(family), batch_of()
    kept = graph_of(model).possible().double().requires_grad_()
    hooks = Interpolated(
        graph_of(model), projections_of(model), kept[None], run_with_cache(model, batch.corrupted), ablation
    )
    with stream_hooks(model, hooks):
        batch.measure(model(input_ids=batch.clean).logits[:, -1]).sum().backward()
    near(eap.edge_scores(model, batch, ablation=ablation), -kept.grad)


@pytest.mark.parametrize("at_once", [1, 5, 32])
def test_how_many_destinations_are_held_at_once_makes_no_difference(at_once: int, monkeypatch) -> None:
    for family in ("gpt2", "llama", "olmo2"):
        model, batch = model_of(family), batch_of()
        wanted = eap.edge_scores(model, batch)
        with monkeypatch.context() as patch:
            patch.setattr("gossamer.circuits.scores.gradients.AT_ONCE", at_once)
            near(eap.edge_scores(model, batch), wanted, 1e-6)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_eap_is_the_limit_of_patching_one_edge_a_little(family: str) -> None:
    model, batch = model_of(family), batch_of()
    graph = graph_of(model)
    scores = eap.edge_scores(model, batch)
    possible = graph.possible()
    for source, destination in torch.nonzero(possible)[::37].tolist():
        values = []
        for share in (1e-4, -1e-4):
            kept = possible.double()
            kept[source, destination] -= share
            values.append(run_with_edges(model, batch, kept).sum())
        slope = (values[0] - values[1]) / 2e-4
        torch.testing.assert_close(scores[source, destination], slope, rtol=1e-4, atol=1e-7)


def test_integrated_gradients_average_over_the_embeddings() -> None:
    """One step takes the gradient at the corrupted embeddings, which is EAP with the prompts exchanged."""
    model, batch = model_of("llama"), batch_of()
    swapped = Batch(batch.corrupted, batch.clean, batch.answers, batch.wrong, batch.metric)
    near(eap_ig_inputs.edge_scores(model, batch, steps=1), -eap.edge_scores(model, swapped))
    exact = (metric(model, batch, batch.corrupted) - metric(model, batch, batch.clean)).sum()
    rough, fine = ((eap_ig_inputs.edge_scores(model, batch, steps=steps)[0].sum() - exact).abs() for steps in (1, 200))
    assert fine < 0.02 * exact.abs() < rough  # edges of the input are on all paths: the integral is the change


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("family", STRUCTURES)
def test_all_edges_kept_is_the_clean_run_and_none_the_corrupted_one(family: str, gated: bool) -> None:
    model, batch = model_of(family, gated), batch_of()
    possible = graph_of(model).possible()
    clean, corrupted = metric(model, batch, batch.clean), metric(model, batch, batch.corrupted)
    near(run_with_edges(model, batch, possible), clean, 1e-5)
    near(run_with_edges(model, batch, torch.zeros_like(possible)), corrupted, 1e-5)
    assert not torch.allclose(clean, corrupted)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_nodes_edges_and_links_agree_where_they_must(family: str) -> None:
    model, batch = model_of(family, gated=True), batch_of()
    graph = graph_of(model)
    clean, corrupted = metric(model, batch, batch.clean), metric(model, batch, batch.corrupted)
    nodes = torch.ones(graph.sources, dtype=torch.bool)
    near(run_with_nodes(model, batch, nodes), clean, 1e-5)
    near(run_with_nodes(model, batch, ~nodes), corrupted, 1e-5)
    nodes[graph.head(1, 2)] = False
    edges = graph.possible()
    edges[graph.head(1, 2)] = False
    for ablation in ABLATIONS:
        near(
            run_with_nodes(model, batch, nodes, ablation=ablation),
            run_with_edges(model, batch, edges, ablation=ablation),
            1e-5,
        )
    shape = (len(batch.clean), graph.layers, graph.heads, 7, 7)
    links = torch.ones(shape, dtype=torch.bool)
    near(run_with_links(model, batch, links), clean, 1e-5)
    for head in range(graph.heads):
        links[:, 1, head] = False
    without_layer = graph.possible()
    without_layer[graph.head(1, 0) : graph.mlp(1)] = False
    near(run_with_links(model, batch, links), run_with_edges(model, batch, without_layer), 1e-5)
    near(run_with_links(model, batch, links, ablation="zero"), _without_heads(model, batch, 1), 1e-5)


def _without_heads(model, batch: Batch, layer: int) -> torch.Tensor:
    """Measure the metric with a zero input to the output projection of a layer."""
    from gossamer.models.architectures import architecture_of, attention_modules

    attention = list(attention_modules(model))[layer]
    projection = attention.get_submodule(architecture_of(model).projections[-1])
    hook = projection.register_forward_pre_hook(lambda _, args: (torch.zeros_like(args[0]),))
    try:
        return metric(model, batch, batch.clean)
    finally:
        hook.remove()


@pytest.mark.parametrize("ablation", ["zero", "mean"])
def test_ablations_keep_everything_or_nothing(ablation: str) -> None:
    model, batch = model_of("gpt2"), batch_of()
    possible = graph_of(model).possible()
    near(run_with_edges(model, batch, possible, ablation=ablation), metric(model, batch, batch.clean), 1e-6)
    nothing = run_with_edges(model, batch, torch.zeros_like(possible), ablation=ablation)
    # With everything ablated, all prompts are the same; only their answers differ.
    assert nothing.isfinite().all()
    assert not torch.allclose(nothing, metric(model, batch, batch.corrupted))


@pytest.mark.parametrize("ablation", ["patch", "zero"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_link_scores_are_derivatives_of_interpolating_each_link(family: str, gated: bool, ablation: str) -> None:
    model, batch = model_of(family, gated), batch_of(2, 5)
    graph = graph_of(model)
    scores = eap.link_scores(model, batch, ablation=ablation)
    links = torch.ones(2, graph.layers, graph.heads, 5, 5, dtype=torch.double)
    for place in ((0, 0, 1, 4, 2), (1, 1, 0, 3, 3), (0, 2, 3, 4, 0), (1, 2, 1, 4, 4)):
        values = []
        for share in (1e-2, -1e-2):  # Gemma's norms round to float32; rounding would hide a smaller step
            kept = links.clone()
            kept[place] -= share
            values.append(run_with_links(model, batch, kept, ablation=ablation).sum())
        slope = (values[0] - values[1]) / 2e-2
        torch.testing.assert_close(scores[place], slope, rtol=1e-3, atol=1e-4 * scores.abs().max().item())


def hooks_of(model: PreTrainedModel) -> list[object]:
    modules = model.modules()
    return [
        hook for module in modules for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    ]


def test_a_model_is_as_before_after_a_visit() -> None:
    for gated in (False, True):
        model, batch = model_of("llama", gated), batch_of()
        model.requires_grad_(True)
        before = metric(model, batch, batch.clean)
        implementation = model.config._attn_implementation
        hooks = hooks_of(model)
        with pytest.raises(RuntimeError), stream_hooks(model, StreamHooks()):
            raise RuntimeError
        eap.edge_scores(model, batch)
        assert model.config._attn_implementation == implementation
        assert hooks_of(model) == hooks
        assert gated or not hooks
        assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
        assert torch.equal(metric(model, batch, batch.clean), before)


def test_units_of_known_models() -> None:
    gpt2 = Graph(12, 12)
    assert (gpt2.sources, gpt2.destinations, int(gpt2.possible().sum())) == (157, 445, 32_491)
    assert int(Graph(30, 9).possible().sum()) == 123_211
    names = [gpt2.source_name(source) for source in (0, 1, 12, 13, 14)]
    assert names == ["input", "a0.h0", "a0.h11", "m0", "a1.h0"]
    reads = [gpt2.destination_name(place) for place in (0, 12, 24, 36, 37, 444)]
    assert reads == ["a0.h0<q>", "a0.h0<k>", "a0.h0<v>", "m0", "a1.h0<q>", "logits"]
    assert gpt2.destination_name(gpt2.read(3, "v", 5)) == "a3.h5<v>"
    assert gpt2.source_name(gpt2.mlp(3)) == "m3"
    assert Graph(2, 2, parallel=True).possible().sum() == Graph(2, 2).possible().sum() - 4


def test_pruning_leaves_what_lies_on_a_path() -> None:
    graph = Graph(2, 1)  # sources input a0 m0 a1 m1
    kept = torch.zeros(graph.sources, graph.destinations, dtype=torch.bool)
    path = [(0, graph.read(0, "v")), (graph.head(0, 0), graph.read(1, "q")), (graph.head(1, 0), graph.logits)]
    unheard, unfed = (0, graph.read(0, "mlp")), (graph.mlp(0), graph.read(1, "mlp"))
    for edge in (*path, unheard, unfed):
        kept[edge] = True
    kept[0, graph.read(0, "mlp")] = True
    pruned = prune(graph, kept)
    assert {tuple(edge) for edge in pruned.nonzero().tolist()} == set(path)


def test_pruned_links_lead_to_the_last_position() -> None:
    kept = torch.zeros(2, 1, 4, 4, dtype=torch.bool)
    for place in ((1, 0, 3, 2), (0, 0, 2, 1), (0, 0, 3, 0), (0, 0, 1, 0), (1, 0, 2, 0)):
        kept[place] = True
    pruned = prune_links(kept[None])[0]
    # (0, 1, 0): position 2 reads position 1 in the same layer, before this link can change it.
    # (1, 2, 0): nothing reads position 2 after layer 1.
    assert {tuple(link) for link in pruned.nonzero().tolist()} == {(1, 0, 3, 2), (0, 0, 2, 1), (0, 0, 3, 0)}


def test_several_circuits_in_one_pass_are_each_alone() -> None:
    for family in ("gpt2", "llama", "olmo2"):
        model, batch = model_of(family, gated=True), batch_of()
        graph = graph_of(model)
        torch.manual_seed(0)
        edges = (torch.rand(3, graph.sources, graph.destinations) < 0.5) & graph.possible()
        together = run_with_edges(model, batch, edges)
        assert together.shape == (3, 3)
        assert not any(result.requires_grad for result in (together, run_with_nodes(model, batch, edges[0].any(1))))
        torch.testing.assert_close(together, torch.stack([run_with_edges(model, batch, each) for each in edges]))
        links = torch.rand(2, 3, graph.layers, graph.heads, 7, 7) < 0.5
        torch.testing.assert_close(
            run_with_links(model, batch, links), torch.stack([run_with_links(model, batch, each) for each in links])
        )
        nodes = torch.rand(2, graph.sources) < 0.5
        torch.testing.assert_close(
            run_with_nodes(model, batch, nodes), torch.stack([run_with_nodes(model, batch, each) for each in nodes])
        )


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_exact_patching_is_what_eap_estimates(family: str) -> None:
    """Clean and corrupted differ very little, but not less: norms round to float32 even in a float64 model."""
    torch.manual_seed(0)
    model, batch = model_of(family), batch_of(2, 5)
    embeddings = model.get_input_embeddings().weight
    with torch.no_grad():
        embeddings[90:95] = embeddings[:5] + 1e-4 * torch.randn(5, embeddings.shape[1])
    clean = torch.arange(5).repeat(2, 1)
    clean[1] = clean[1].flip(0)
    batch = Batch(clean, clean + 90, batch.answers, batch.wrong, batch.metric)
    edges = exact.edge_scores(model, batch)
    near(eap.edge_scores(model, batch), edges, 5e-3)
    near(edges.sum(1), exact.node_scores(model, batch), 5e-3)
    near(eap.link_scores(model, batch), exact.link_scores(model, batch), 5e-3)


def test_top_edges_are_the_largest_possible_ones() -> None:
    graph = Graph(1, 1)
    scores = torch.arange(graph.sources * graph.destinations, dtype=torch.double).view(graph.sources, -1)
    scores[0, 0] = -100
    assert top_edges(graph, scores, 1).nonzero().tolist() == [[0, 0]]
    assert top_edges(graph, scores, 1, absolute=False).nonzero().tolist() == [[0, 0]]
    assert top_edges(graph, -scores, 1, absolute=False).nonzero().tolist() == [[2, graph.logits]]
    assert top_edges(graph, scores, 99).sum() == graph.possible().sum()


def prompts_of_two_lengths() -> Prompts:
    example = Example("", "", ("",), ("",))
    kept = [
        TokenizedExample(example, clean, corrupted, answers, wrong)
        for batch in (batch_of(4, 6), batch_of(3, 7))
        for clean, corrupted, answers, wrong in zip(
            batch.clean, batch.corrupted, batch.answers, batch.wrong, strict=True
        )
    ]
    return Prompts("logit_difference", tuple(kept), ())


@pytest.mark.parametrize("ablation", ["zero", "mean"])
def test_what_is_measured_is_the_circuit_that_is_reported(ablation: str) -> None:
    """Under these ablations, units that are cut off still matter: they write their biases."""
    model, prompts = model_of("gpt2"), prompts_of_two_lengths()
    found = find_circuits(model, prompts, levels=("edges",), score=SCORES["eap"], ablation=ablation, batch_size=4)
    points = {point.size: point.metric for point in found.curves["edges"].points}
    cut_off = 0
    for size, measured in points.items():
        reported = faithfulness_of(model, prompts, found.edges(size), ablation=ablation, batch_size=2)
        assert reported.metric == pytest.approx(measured, rel=1e-6, abs=1e-6)
        cut_off += size - int(found.edges(size).sum())
    assert cut_off > 0


def test_the_mean_is_that_of_all_prompts_of_a_length() -> None:
    model, prompts = model_of("llama"), prompts_of_two_lengths()
    settings = {"levels": ("nodes", "edges"), "ablation": "mean"}
    alone, together = (find_circuits(model, prompts, batch_size=size, **settings) for size in (1, 4))
    near(alone.scores.double(), together.scores.double(), 1e-5)
    for level, curve in together.curves.items():
        wanted = torch.tensor([point.metric for point in curve.points])
        torch.testing.assert_close(torch.tensor([p.metric for p in alone.curves[level].points]), wanted)
    corrupted = torch.stack([tokens.corrupted for tokens in prompts.kept[:4]])
    written = run_with_cache(model, corrupted).written
    means = mean_source_outputs(model, together.batches)
    torch.testing.assert_close(means[6], written.mean(1))
    assert set(means) == {6, 7}


class Inner(StreamHooks):
    """Records the inputs of attention in layer 1."""

    def attend(self, layer, q, k, v, pattern):
        if layer == 1:
            self.seen = {"q": q, "k": k, "v": v}
        return super().attend(layer, q, k, v, pattern)


@torch.no_grad()
@pytest.mark.parametrize("family", STRUCTURES)
def test_places_are_where_the_heads_come_from(family: str) -> None:
    model, ids = model_of(family), tokens(2, 6)

    def inner() -> dict[str, torch.Tensor]:
        hooks = Inner()
        with stream_hooks(model, hooks):
            model(input_ids=ids)
        return hooks.seen

    before = inner()
    for kind, place in projections_of(model)[1].items():
        for head in range(4):
            columns = place.columns[head]
            weight = place.module.weight.mT if isinstance(place.module, Conv1D) else place.module.weight
            saved = weight[columns].clone()
            weight[columns] = saved.flip(1)
            after = inner()
            weight[columns] = saved
            sharing = place.sharing()[head].tolist()
            for other in "qkv":
                changed = [not torch.allclose(after[other][:, h], before[other][:, h]) for h in range(4)]
                assert changed == (sharing if other == kind else [False] * 4)
