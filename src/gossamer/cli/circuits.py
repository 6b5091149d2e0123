"""The commands task, circuits, export and evaluate-circuit: what a model can do, and which of its units do it."""

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from gossamer.circuits.ablations import ABLATIONS
from gossamer.circuits.config import PromptConfig, SearchConfig
from gossamer.cli.common import app, console, key_value_table, load_dense_and_sparse, load_model_and_tokenizer
from gossamer.cli.option_groups import with_option_groups
from gossamer.errors import GossamerError
from gossamer.fields import setting
from gossamer.tables import Table

Ablation = Enum("Ablation", {name: name for name in ABLATIONS}, type=str)  # type: ignore[misc]


_PATCH = Ablation("patch")


class ModelChoice(str, Enum):
    """The models of a run."""

    dense = "dense"
    sparse = "sparse"


@dataclass(frozen=True)
class ChoiceOptions:
    """How to choose a circuit by the scores in its file."""

    edges: int | None = setting(
        "Keep this many edges with the largest absolute scores, instead of the file's choice.", None, least=1
    )
    nodes: int | None = setting("Likewise for nodes.", None, least=1)
    neurons: int | None = setting("Likewise for neurons.", None, least=1)
    signed: bool = setting("With --edges, --nodes or --neurons: rank by signed score instead of absolute score.", False)


_Dense = Annotated[
    str | None, typer.Option(help="The dense model, if MODEL does not record which one it was made from.")
]


@app.command()
@with_option_groups
def task(
    name: Annotated[str, typer.Argument(help="A task's name, or a .jsonl file with your own examples.")],
    model: Annotated[str, typer.Option(help="A run, a saved sparse model, or a dense model as for sparsify.")],
    asked: PromptConfig,
    show: Annotated[int, typer.Option(min=0, help="Number of examples to print.")] = 3,
) -> None:
    """Show examples of a task, and how well MODEL does it."""
    from collections import Counter

    from gossamer.circuits.ability import measure_ability, require_known_tokens
    from gossamer.circuits.tasks import find_task

    chosen = find_task(name)
    network, tokenizer = load_model_and_tokenizer(model)
    prompts = chosen.prompts(tokenizer, asked.examples, seed=asked.seed, corruption=asked.corruption)
    require_known_tokens(network, tokenizer, prompts)
    table = Table(title=escape(f"{chosen.name}: {chosen.summary}"))
    for column in ("clean", "corrupted", "right", "wrong"):
        table.add_column(column)
    for tokens in prompts.kept[:show]:
        example = tokens.example
        table.add_row(*map(escape, (example.clean, example.corrupted, _some(example.answers), _some(example.wrong))))
    console.print(table)
    for reason, times in Counter(dropped.reason for dropped in prompts.dropped).most_common():
        console.print(f"{times} dropped: {reason}", markup=False)
    ability = measure_ability(network, prompts)
    facts: dict[str, object] = {
        "prompts": ability.prompts,
        "right": f"{100 * ability.accuracy:.1f} %",
        f"{prompts.metric.replace('_', ' ')}, clean": f"{ability.clean:.3f}",
        f"{prompts.metric.replace('_', ' ')}, corrupted": f"{ability.corrupted:.3f}",
    }
    console.print(key_value_table(model, facts))


def _some(texts: tuple[str, ...]) -> str:
    shown = " ".join(repr(text) for text in texts[:4])
    return shown if len(texts) <= 4 else f"{shown} and {len(texts) - 4} more"


@app.command()
@with_option_groups
def circuits(
    model: Annotated[
        str, typer.Argument(help="A finished run; or, with --out, smollm2-sparse or a saved sparse model.")
    ],
    task: Annotated[str, typer.Option(help="A task's name, or a .jsonl file with your own examples.")],
    config: SearchConfig,
    dense: _Dense = None,
    out: Annotated[Path | None, typer.Option(help="Directory for the circuits.", show_default="the run's")] = None,
) -> None:
    """Find circuits of a sparse model and of its dense original, check them by intervention, and compare them.

    Writes circuits.json (the metrics), scores.safetensors (of all edges) and links.json to RUN/circuits/TASK or
    OUT/circuits/TASK. A corruption or ablation other than the default is added to the name: TASK-CORRUPTION-zero.
    """
    from transformers.utils import logging

    from gossamer.circuits.compare import compare_models
    from gossamer.circuits.tables import comparison_tables
    from gossamer.circuits.tasks import find_task
    from gossamer.training.malloc import keep_freed_memory

    logging.disable_progress_bar()
    root = _root(model) if out is None else out
    keep_freed_memory()
    chosen = find_task(task)
    with console.status("circuits") as status:
        models = load_dense_and_sparse(model, dense)
        record = compare_models(*models, chosen, root, config, progress=lambda what: status.update(escape(what)))
    for table in comparison_tables(record):
        console.print(table)


def _root(model: str) -> Path:
    """The directory of a run, to which its circuits are written."""
    if not (Path(model) / "blocks.safetensors").exists():
        raise GossamerError(f"{model} is not a run; for circuits of another sparse model, give a directory as --out")
    return Path(model)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run with circuits, or the --out directory of gossamer circuits.")],
    task: Annotated[str, typer.Option(help="The --task given to gossamer circuits.")],
    out: Annotated[
        Path,
        typer.Option(help="File to write: .json or .pt (the format of EAP-IG and the MIB leaderboard), or .graphml."),
    ],
    model: Annotated[ModelChoice, typer.Option(help="The model whose circuit to write.")] = ModelChoice.sparse,
    edges: Annotated[
        int | None,
        typer.Option(min=1, help="Number of edges to keep, before pruning.", show_default="those that explain 90 %"),
    ] = None,
    corruption: Annotated[
        str | None, typer.Option(help="The corruption it was found with.", show_default="the task's first")
    ] = None,
    ablation: Annotated[Ablation, typer.Option(help="The ablation it was found with.")] = _PATCH,
) -> None:
    """Write a circuit found by gossamer circuits to a file for other tools."""
    from gossamer.circuits.circuit_files import write_circuit
    from gossamer.circuits.records import load_circuit
    from gossamer.circuits.tasks import find_task

    chosen = find_task(task)
    circuit = load_circuit(run, chosen, model.value, edges, corruption=corruption, ablation=ablation.value)
    write_circuit(out, circuit)
    console.print(f"{out}: {int(circuit.kept.sum()):,} of {int(circuit.graph.possible().sum()):,} edges", markup=False)


@app.command()
@with_option_groups
def evaluate_circuit(
    circuit: Annotated[Path, typer.Argument(help="A circuit file: .json or .pt of EAP-IG, or .graphml.")],
    model: Annotated[str, typer.Option(help="A run, a saved sparse model, or a dense model as for sparsify.")],
    task: Annotated[str, typer.Option(help="A task's name, or a .jsonl file with your own examples.")],
    choice: ChoiceOptions,
    asked: PromptConfig,
    ablation: Annotated[Ablation, typer.Option(help="What edges outside the circuit carry.")] = _PATCH,
    force: Annotated[bool, typer.Option("--force", help="Continue even if the model cannot do the task.")] = False,
) -> None:
    """Measure how much of a task the CIRCUIT in a file explains: keep its edges, patch all others, run MODEL.

    Of a node of which the file chooses some neurons, the kept edges carry those alone; where edges between nodes are
    missing too, EAP-IG's value stands beside, which lets these neurons through them. A file with scores alone needs
    --edges, --nodes or --neurons. Edges that are cut off from input or logits are left out.
    """
    from gossamer.circuits.ability import measure_ability, require_ability, require_known_tokens
    from gossamer.circuits.circuit_files import require_graph_of
    from gossamer.circuits.graph import between_nodes, prune
    from gossamer.circuits.search import faithfulness_of
    from gossamer.circuits.tasks import find_task

    found, chosen = _circuit_in(circuit, choice), find_task(task)
    network, tokenizer = load_model_and_tokenizer(model)
    require_graph_of(network, found, circuit)
    prompts = chosen.prompts(tokenizer, asked.examples, seed=asked.seed, corruption=asked.corruption)
    require_known_tokens(network, tokenizer, prompts)
    require_ability(measure_ability(network, prompts), chosen.name, forced=force)

    def measure(kept: "Tensor") -> "Point":  # type: ignore[name-defined]
        return faithfulness_of(network, prompts, kept, neurons=found.neurons, fed=found.fed, ablation=ablation.value)

    point, pruned = measure(found.kept), prune(found.graph, found.kept, fed=found.fed)
    facts: dict[str, object] = {"edges": f"{point.size:,} of {int(found.graph.possible().sum()):,}"}
    if (cut_off := int(found.kept.sum()) - point.size) > 0:
        facts["cut off, left out"] = f"{cut_off:,}"
    if found.neurons is not None:
        facts["neurons"] = f"{int(found.neurons.sum()):,} of {found.neurons.numel():,}"
    facts[f"mean {prompts.metric.replace('_', ' ')}"] = f"{point.metric:.3f}"
    facts["faithfulness"] = f"{point.faithfulness:.3f}"
    every = between_nodes(found.graph, pruned)
    if found.neurons is not None and not found.neurons[pruned.any(1)].all() and not every.equal(pruned):
        facts["faithfulness in EAP-IG"] = f"{measure(every).faithfulness:.3f}"
    console.print(key_value_table(f"{circuit} on {chosen.name}", facts))


def _circuit_in(file: Path, choice: ChoiceOptions) -> "Circuit":  # type: ignore[name-defined]
    """Read the circuit of a file, or choose one by the scores in the file."""
    from gossamer.circuits.circuit_files import Level, choose, read_circuit

    found = read_circuit(file)
    counts: dict[Level, int | None] = {"edges": choice.edges, "nodes": choice.nodes, "neurons": choice.neurons}
    asked = [(level, count) for level, count in counts.items() if count is not None]
    if len(asked) > 1:
        raise GossamerError("--edges, --nodes and --neurons choose a circuit by other scores each; give one of them")
    if choice.signed and not asked:
        raise GossamerError("--signed says how to choose by scores; give --edges, --nodes or --neurons too")
    for level, count in asked:
        if level == "edges" and file.suffix == ".graphml" and count > (most := int(found.kept.sum())):
            raise GossamerError(f"{file} holds {most:,} edges and nothing of others; --edges {count} is too many")
        return choose(found, level, count, absolute=not choice.signed, name=file)
    if not found.kept.any():
        flags = " or ".join(f"--{level}" for level in found.scored)
        how = f"it holds scores alone; say how many to keep by {flags}" if flags else "nor has it scores to choose by"
        raise GossamerError(f"{file} keeps no edge: {how}")
    return found
