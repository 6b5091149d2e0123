"""Faithfulness of node circuits on IOI prompts not used in the search: python nodes_on_new_prompts.py circuits.json."""

import json
import sys
from pathlib import Path

import torch

from gossamer.circuits.intervention import run_with_nodes
from gossamer.circuits.streams import graph_of
from gossamer.circuits.tasks import find_task
from gossamer.cli.common import load_dense_and_sparse

PROMPTS, SEED = 64, 1


def main() -> None:
    """Print f of each model's circuit, and of all other nodes together with the input."""
    record = json.loads(Path(sys.argv[1]).read_text())
    dense, sparse, tokenizer = load_dense_and_sparse("smollm2-sparse")
    prompts = find_task("ioi").prompts(tokenizer, PROMPTS, seed=SEED, corruption=record["corruption"])
    for name, model in (("dense", dense.eval()), ("sparse", sparse.eval())):
        graph = graph_of(model)
        names = record["models"][name]["circuit"]["nodes"]["names"]
        kept = torch.tensor([graph.source_name(source) in names for source in range(graph.sources)])
        others = ~kept
        others[0] = True
        circuits = torch.stack([torch.zeros_like(kept), torch.ones_like(kept), kept, others])
        metrics = sum(run_with_nodes(model, batch, circuits).double().sum(1) for batch in prompts.batches(16))
        nothing, everything, circuit, rest = torch.as_tensor(metrics).tolist()
        shares = [(each - nothing) / (everything - nothing) for each in (circuit, rest)]
        print(f"{name}: {int(kept.sum())} nodes keep {shares[0]:.3f}; the others and the input {shares[1]:.3f}")


if __name__ == "__main__":
    main()
