"""Links counted over forward passes."""

import torch

import gossamer
from families import tiny_model, tokens
from gossamer.measures.language import forward_passes, measure_language
from gossamer.measures.links import LinkCounter


def test_padding_is_not_counted() -> None:
    gated = gossamer.add_gates(tiny_model("llama"), gate_bias=0.0)
    ids, length = tokens(1, 9), 9
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], dim=1)
    mask = torch.tensor([[0] * 4 + [1] * length])
    tallies = []
    for batch in ({"input_ids": ids}, {"input_ids": padded, "attention_mask": mask}):
        tally = LinkCounter.empty(3, 4)
        with torch.no_grad(), gossamer.counted_links(gated) as counts:
            gated(**batch)
        tally.add(counts, length)
        tallies.append(tally)
    assert torch.equal(tallies[0].allowed_links, tallies[1].allowed_links)
    assert torch.equal(tallies[0].open_links, tallies[1].open_links)
    assert tallies[0].open_fraction_per_head[1][2] == tallies[0].open_links[1, 2] / tallies[0].allowed_links[1, 2]


def test_the_links_of_a_measurement_are_those_of_all_its_batches() -> None:
    gated, blocks = gossamer.add_gates(tiny_model("llama"), gate_bias=0.0), tokens(5, 12)
    whole = measure_language(gated, blocks, batch_size=5).links
    parts = measure_language(gated, blocks, batch_size=2).links
    assert torch.equal(whole.open_links, parts.open_links)
    assert whole.allowed_links[2, 3] == parts.allowed_links[2, 3] == 5 * 12 * 13 // 2
    assert (whole.queries, whole.open_links_per_query) == (60, parts.open_links_per_query)
    alone = forward_passes(gated, blocks.split(1), lambda logits, ids: ids)
    assert torch.equal(torch.cat([ids for ids, _ in alone]), blocks)
    assert torch.equal(LinkCounter.total([links for _, links in alone]).open_links, whole.open_links)
    assert measure_language(tiny_model("llama"), blocks).links.allowed_links.sum() == 0
