"""Compare EAP scores of all component edges with one forward and backward pass over the same prompts: time and memory.

    python benchmarks/attribution.py [--model smollm2] [--task ioi] [--prompts 100] [--record FILE]
    python benchmarks/attribution.py --peer [--prompts 4] [--tokens 14] [--record FILE]

The first form times `edge_scores` on a model, alternating with two kinds of forward and backward pass over the clean
prompts: with gradients of the embeddings only, which attribution needs from autograd, and with gradients of all
weights, as in training. Memory is measured in separate processes: the peak resident set while computing scores, minus
the resident set before the model was loaded, as a multiple of the size of the model's parameters.

The second form compares gossamer with TransformerLens' attribution patching (edges, 4.3), which does not support
grouped queries, on a model with the sizes of GPT-2 small, random weights and random prompts. TransformerLens takes the
gradient in the corrupted run and scores each position of an edge separately, one prompt at a time. gossamer gets the
prompts with their roles swapped, so that its scores are the sums of TransformerLens' over positions; the largest
difference is printed.
"""

import argparse
import copy
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from attention import record

from gossamer.circuits.scores import eap, eap_ig_inputs
from gossamer.circuits.streams import graph_of
from gossamer.circuits.tasks import find_task
from gossamer.circuits.tasks.base import Batch
from gossamer.models.pretrained import load_dense
from gossamer.training.malloc import keep_freed_memory


def both_ways(model: torch.nn.Module, batch: Batch, *, weights: bool) -> None:
    """Run one forward and backward pass over the clean prompts."""
    model.requires_grad_(weights)
    inputs = model.get_input_embeddings()(batch.clean)
    inputs = inputs if weights else inputs.detach().requires_grad_()
    logits = model(inputs_embeds=inputs, use_cache=False, logits_to_keep=1).logits[:, -1]
    batch.measure(logits).sum().backward()
    model.zero_grad(set_to_none=True)


def resident(field: str) -> float:
    """A field of this process's memory status in Linux, in megabytes."""
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) / 1024


def memory(arguments: argparse.Namespace) -> None:
    """Print the memory for loading the model and the peak memory of one job; runs in a separate process."""
    before = resident("VmRSS")
    model, tokenizer = load_dense(arguments.model)
    model.eval()
    batches = list(find_task(arguments.task).prompts(tokenizer, arguments.prompts).batches(arguments.batch))
    # Memory that loading took beyond the model has been freed; the peak is measured from here on.
    loaded = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    work = jobs(model)[arguments.memory]
    for batch in batches:
        work(batch)
    parameters = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    print(json.dumps({
        "model_megabytes": parameters, "loaded_megabytes": loaded - before,
        "peak_megabytes": resident("VmHWM") - before,
    }))  # fmt: skip


def jobs(model: torch.nn.Module) -> dict[str, Callable[[Batch], object]]:
    """The jobs to time, by name."""
    return {
        "forward and backward, embeddings": lambda batch: both_ways(model, batch, weights=False),
        "forward and backward, weights": lambda batch: both_ways(model, batch, weights=True),
        "EAP, all edges": lambda batch: eap.edge_scores(model, batch),
        "EAP-IG (5 steps), all edges": lambda batch: eap_ig_inputs.edge_scores(model, batch, steps=5),
    }


def peer(arguments: argparse.Namespace) -> None:
    """Time TransformerLens and gossamer alternately on the same model and prompts."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module
    from transformer_lens.tools.analysis.attribution_patching import EdgeAttributionConfig, attribution_patch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(attn_implementation="eager")).eval()
    graph = graph_of(model)
    shape = arguments.prompts, arguments.tokens
    clean, corrupted = (torch.randint(50_257, shape) for _ in range(2))
    right, wrong = (torch.tensor([token]) for token in (11, 99))
    batch = Batch(corrupted, clean, (right,) * len(clean), (wrong,) * len(clean), "logit_difference")
    # The bridge takes apart the modules of the model that it is given.
    bridge = build_bridge_from_module(copy.deepcopy(model), "GPT2LMHeadModel", hf_config=model.config).eval()
    settings = EdgeAttributionConfig(granularity="edge")

    def metric(logits: torch.Tensor) -> torch.Tensor:
        return logits[0, -1, 11] - logits[0, -1, 99]

    kinds = {"q_input": "q", "k_input": "k", "v_input": "v", "mlp_in": "mlp", "logits": "logits"}
    seconds: dict[str, list[float]] = {"TransformerLens": [], "gossamer": []}
    for _ in range(arguments.rounds):
        started = time.perf_counter()
        theirs = attribution_patch(bridge, clean, corrupted, metric, settings)
        seconds["TransformerLens"].append(time.perf_counter() - started)
        started = time.perf_counter()
        ours = eap.edge_scores(model, batch) / len(clean)
        seconds["gossamer"].append(time.perf_counter() - started)
    summed = torch.zeros_like(ours)
    for (writer, reader), score in theirs.edge_scores.items():
        source = 0 if writer.kind == "embed" else graph.mlp(writer.layer)
        source = graph.head(writer.layer, writer.head) if writer.kind == "attn_head_out" else source
        summed[source, graph.read(reader.layer, kinds[reader.kind], reader.head or 0)] += score
    result = record(arguments)
    # TransformerLens' input node is the token embedding alone, without the position embedding.
    result["largest_difference"] = ((summed - ours)[1:].abs().max() / ours[1:].abs().max()).item()
    result["seconds"] = {name: statistics.median(taken) for name, taken in seconds.items()}
    result["scores"] = {"TransformerLens": len(theirs.edge_scores), "gossamer": int(graph.possible().sum())}
    for name, taken in result["seconds"].items():
        print(
            f"{name:16} {taken:8.2f} s ({taken / result['seconds']['gossamer']:.1f})  {result['scores'][name]:,} scores"
        )
    print(f"largest difference of any edge, of the largest score: {result['largest_difference']:.1e}")
    write(arguments.record, result)


def write(file: Path | None, result: dict) -> None:
    """Write the record to the file that was given, if any."""
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--task", default="ioi")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--record", type=Path, help="write the figures here")
    parser.add_argument("--peer", action="store_true", help="beside TransformerLens")
    parser.add_argument("--tokens", type=int, default=14, help="with --peer: length of the random prompts")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer:
        keep_freed_memory()
        return peer(arguments)
    if arguments.memory:
        return memory(arguments)
    keep_freed_memory()
    result = record(arguments)
    model, tokenizer = load_dense(arguments.model)
    model.eval()
    batches = list(find_task(arguments.task).prompts(tokenizer, arguments.prompts).batches(arguments.batch))
    edges = int(graph_of(model).possible().sum())
    print(f"{arguments.model}: {edges:,} edges, {arguments.prompts} prompts of {arguments.task}")
    seconds: dict[str, list[float]] = {name: [] for name in jobs(model)}
    for _ in range(arguments.rounds):
        taken = dict.fromkeys(seconds, 0.0)
        for batch in batches:
            for name, work in jobs(model).items():
                started = time.perf_counter()
                work(batch)
                taken[name] += time.perf_counter() - started
        for name, total in taken.items():
            seconds[name].append(total)
    result["edges"], result["rows"] = edges, []
    for name, totals in seconds.items():
        options = {key: getattr(arguments, key) for key in ("model", "task", "prompts", "batch")} | {"memory": name}
        command = [sys.executable, __file__, *(f"--{key}={value}" for key, value in options.items())]
        found = json.loads(
            subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
        )
        row = {"what": name, "seconds": statistics.median(totals), **found}
        result["rows"].append(row)
        ratios = [row["seconds"] / other["seconds"] for other in result["rows"][:2]]
        times = "  ".join(f"{ratio:5.2f}" for ratio in ratios)
        share = row["peak_megabytes"] / row["model_megabytes"]
        print(f"{name:34} {row['seconds']:7.2f} s  {times}  peak {row['peak_megabytes']:6.0f} MB ({share:.2f} models)")
    write(arguments.record, result)


if __name__ == "__main__":
    main()
