"""Masks on nodes and edges, and the search for sets of them."""

import pytest
import torch

from circuit_cases import batch_of, model_of
from gossamer.circuits.ablations import ABLATIONS
from gossamer.circuits.activation_cache import run_with_cache
from gossamer.circuits.intervention import run_with_edges, run_with_links, run_with_nodes
from gossamer.circuits.mask_search import MaskRow
from gossamer.circuits.scores import SCORES
from gossamer.circuits.search import find_circuits, top_links
from gossamer.circuits.streams import graph_of
from gossamer.circuits.task_masks import PROMPTS, TaskMasks, metric_under_masks, with_input
from gossamer.circuits.tasks.base import Batch, Example, Prompts, TokenizedExample
from gossamer.errors import GossamerError


def random_masks(model, units: str, rows: int = 2) -> torch.Tensor:
    graph = graph_of(model)
    count = graph.sources - 1 if units == "nodes" else int(graph.possible().sum())
    return torch.rand(rows, count, generator=torch.Generator().manual_seed(0), dtype=torch.double)


@pytest.mark.parametrize("ablation", ABLATIONS)
@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "gemma2"])
def test_hard_masks_are_interventions(family: str, ablation: str) -> None:
    model, batch = model_of(family, gated=True), batch_of(3, 5)
    graph, other = graph_of(model), run_with_cache(model, batch.corrupted)
    for units, run in (("nodes", run_with_nodes), ("edges", run_with_edges)):
        masks = random_masks(model, units).round()
        kept = with_input(masks.bool())
        if units == "edges":
            kept = masks.bool()
            places = graph.possible().expand(len(masks), -1, -1)
            kept = torch.zeros(places.shape, dtype=torch.bool).masked_scatter(places, kept)
        wanted = run(model, batch, kept, ablation=ablation, other=other)
        with torch.no_grad():
            found = metric_under_masks(model, batch, masks, units, ablation=ablation, other=other)
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("units", ["nodes", "edges"])
def test_the_metric_has_its_gradient_by_the_masks(units: str) -> None:
    model, batch = model_of("gpt2", gated=True), batch_of(2, 4)
    other = run_with_cache(model, batch.corrupted)
    masks = random_masks(model, units, rows=1).requires_grad_()

    def metric(values: torch.Tensor) -> torch.Tensor:
        return metric_under_masks(model, batch, values, units, other=other).sum()

    (gradient,) = torch.autograd.grad(metric(masks), masks)
    step = 1e-6
    with torch.no_grad():
        for unit in gradient[0].abs().topk(5).indices.tolist():
            up, down = masks.clone(), masks.clone()
            up[0, unit] += step
            down[0, unit] -= step
            slope = (metric(up) - metric(down)) / (2 * step)
            assert gradient[0, unit].item() == pytest.approx(slope.item(), rel=1e-4)


def prompts_of(batch: Batch) -> Prompts:
    rows = zip(batch.clean, batch.corrupted, batch.answers, batch.wrong, strict=True)
    kept = tuple(TokenizedExample(Example("", "", ("a",), ("b",)), *row) for row in rows)
    return Prompts(batch.metric, kept, ())


@pytest.mark.parametrize("units", ["nodes", "edges"])
def test_shares_go_from_nothing_to_everything(units: str) -> None:
    model, batch = model_of("gpt2", gated=True), batch_of(4, 5)
    masks = TaskMasks(model, [batch], units, "patch", {})
    none = torch.zeros(len(masks), dtype=torch.bool)
    kept, left = masks.kept([none, ~none]), masks.left_when_cut([none, ~none])
    torch.testing.assert_close(kept, torch.tensor([0.0, 1.0]).double())
    torch.testing.assert_close(left, torch.tensor([1.0, 0.0]).double())
    rows = [MaskRow(each.double(), False) for each in (none, ~none)]
    with torch.no_grad():
        torch.testing.assert_close(masks.shares(rows), kept)  # all four prompts are in one batch


def test_a_search_looks_at_the_first_prompts_in_turn() -> None:
    model, batch = model_of("gpt2"), batch_of(PROMPTS + 9, 4)
    masks = TaskMasks(model, list(prompts_of(batch).batches(10)), "nodes", "patch", {})
    assert sum(len(each.clean) for each in masks.batches) == PROMPTS
    seen = torch.cat([each.clean for each in masks.graded])
    assert torch.equal(seen, batch.clean[:PROMPTS])


def test_a_metric_that_replacing_everything_leaves_alone_is_refused() -> None:
    batch = batch_of(2, 4)
    same = Batch(batch.clean, batch.clean, batch.answers, batch.wrong, batch.metric)
    with pytest.raises(GossamerError, match="changes nothing"):
        TaskMasks(model_of("gpt2"), [same], "nodes", "patch", {})


@pytest.mark.parametrize("name", ["learned-mask", "learned-mask-complete"])
def test_a_search_finds_a_set_that_does_what_it_has_to(name: str) -> None:
    model, prompts = model_of("gpt2", gated=True), prompts_of(batch_of(6, 5))
    training = [parameter.requires_grad for parameter in model.parameters()]
    found = find_circuits(model, prompts, levels=("nodes", "edges"), score=SCORES[name])
    assert [parameter.requires_grad for parameter in model.parameters()] == training
    assert all(parameter.grad is None for parameter in model.parameters())
    for level, units in (("nodes", found.nodes), ("edges", found.edges)):
        (chosen,) = found.sets[level]
        assert 0 < len(chosen) < found.curves[level].total
        assert chosen.kept >= 0.9
        assert chosen.left_when_cut <= 0.1 or name == "learned-mask"
        # The set's units are ranked first, so the best units of the same number are the set.
        size = len(chosen) + (level == "nodes")
        best = units(size)
        assert torch.equal(best[1:] if level == "nodes" else best[found.graph.possible()], chosen.chosen)
        assert found.curves[level].first_size <= size


@pytest.mark.parametrize("ablation", ["patch", "zero"])
@pytest.mark.parametrize("name", ["learned-mask", "learned-mask-complete"])
def test_each_prompt_has_links_that_do_what_they_have_to(
    name: str, ablation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gossamer.circuits.mask_search.STEPS", 10)
    model, prompts = model_of("llama", gated=True), prompts_of(batch_of(3, 5))
    found = find_circuits(model, prompts, levels=("links",), score=SCORES[name], ablation=ablation, batch_size=2)
    assert [len(scores) for scores in found.link_scores] == [2, 1]
    everything = torch.ones_like(found.link_scores[0][:1], dtype=torch.bool).tril()
    for at, each in enumerate(found.sets["links"]):
        batch = found.batches[at // 2].rows(slice(at % 2, at % 2 + 1))
        scores = found.link_scores[at // 2][at % 2][None]
        kept = top_links(scores, len(each))
        assert int(kept.sum()) == len(each)
        assert (scores[kept] < 0).all()  # closed links have score 0
        metrics = run_with_links(
            model,
            batch,
            torch.stack([torch.zeros_like(everything), kept, everything & ~kept, everything]),
            ablation=ablation,
        )
        nothing, with_set, without, full = metrics[:, 0].tolist()
        assert each.kept == pytest.approx((with_set - nothing) / (full - nothing), abs=1e-4)
        assert each.left_when_cut == pytest.approx((without - nothing) / (full - nothing), abs=1e-4)
        assert each.kept >= 0.9
        assert each.left_when_cut <= 0.1 or name == "learned-mask"


def test_a_prompt_whose_links_change_nothing_is_named() -> None:
    batch = batch_of(2, 4)
    same = Batch(
        batch.clean, torch.stack([batch.corrupted[0], batch.clean[1]]), batch.answers, batch.wrong, batch.metric
    )
    search = SCORES["learned-mask"].link_search
    assert search is not None
    with pytest.raises(GossamerError, match=r"prompt 2 of 2 with 4 tokens: the logit difference is .*; give another"):
        search(model_of("gpt2"), same, ablation="patch", progress=lambda what: None)


def test_what_is_left_without_a_circuit_is_measured_by_intervention() -> None:
    model, batch = model_of("gpt2", gated=True), batch_of(6, 5)
    found = find_circuits(model, prompts_of(batch), score=SCORES["eap"])
    for level, run in (("nodes", run_with_nodes), ("edges", run_with_edges)):
        curve = found.curves[level]
        kept = found.nodes(curve.first_size) if level == "nodes" else found.edges(curve.first_size)
        everything = torch.ones_like(kept) if level == "nodes" else found.graph.possible()
        others = everything & ~kept
        if level == "nodes":
            others[0] = True  # the input is always kept
        metric = run(model, batch, others).mean().item()
        share = (metric - curve.nothing) / (curve.everything - curve.nothing)
        assert found.left_when_cut[level] == pytest.approx(share)
    assert found.left_when_cut["links"] is not None
