"""EAP compared with TransformerLens' attribution patching, an independent implementation that scores by position."""

import copy

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from gossamer.circuits.scores import eap
from gossamer.circuits.streams import graph_of
from gossamer.circuits.tasks.base import Batch

transformer_lens = pytest.importorskip("transformer_lens")

KINDS = {"q_input": "q", "k_input": "k", "v_input": "v", "mlp_in": "mlp", "logits": "logits"}


def test_edge_scores_are_transformer_lens_summed_over_positions() -> None:
    """TransformerLens takes the gradient in the corrupted run, so the prompts are exchanged here."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module
    from transformer_lens.tools.analysis.attribution_patching import EdgeAttributionConfig, attribution_patch

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=50, n_positions=8, n_embd=12, n_layer=2, n_head=3, attn_implementation="eager")
        model = GPT2LMHeadModel(config).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        clean, corrupted = (torch.randint(50, (2, 5)) for _ in range(2))
    # The bridge changes the modules of the model it is given.
    bridge = build_bridge_from_module(copy.deepcopy(model), "GPT2LMHeadModel", hf_config=config).eval()
    theirs = attribution_patch(
        bridge,
        clean,
        corrupted,
        lambda logits: logits[0, -1, 11] - logits[0, -1, 9],
        EdgeAttributionConfig(granularity="edge"),
    )
    right, wrong = ((torch.tensor([token]),) * 2 for token in (11, 9))
    ours = eap.edge_scores(model, Batch(corrupted, clean, right, wrong, "logit_difference")) / len(clean)
    graph = graph_of(model)
    summed, edges = torch.zeros_like(ours), set()
    for (writer, reader), score in theirs.edge_scores.items():
        if writer.kind == "embed":  # TransformerLens' source is the token embedding without the position embedding
            continue
        source = graph.head(writer.layer, writer.head) if writer.kind == "attn_head_out" else graph.mlp(writer.layer)
        destination = graph.read(reader.layer, KINDS[reader.kind], reader.head or 0)
        summed[source, destination] += score
        edges.add((source, destination))
    assert edges == {(source, target) for source, target in graph.possible().nonzero().tolist() if source > 0}
    assert ours[1:].abs().max() > 0.1
    torch.testing.assert_close(summed[1:], ours[1:], rtol=1e-4, atol=1e-5)
