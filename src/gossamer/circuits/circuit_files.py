"""Read and write circuits in file formats that other tools use.

``.json`` and ``.pt`` are the formats of EAP-IG (hannamw/EAP-IG on GitHub), which the MIB leaderboard accepts.
``.graphml`` holds only the nodes and edges in the circuit, for networkx, Gephi or Cytoscape.

Scores in files have EAP-IG's sign. EAP-IG attributes a loss, the metric times -1, so units that help have positive
scores.

A file may hold only scores of edges, nodes or neurons and leave the choice of units to the reader: :func:`choose`.
Neurons are the dimensions of a node's output to the residual stream. A graph chosen by nodes or neurons keeps all
edges of a node. In ``.pt`` files these include backward edges, which no model has. EAP-IG counts them when it prunes,
so a node chosen as a whole is never cut off from the input: :attr:`Circuit.fed`.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

import networkx
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel

from gossamer.circuits.graph import Graph, top_edges
from gossamer.circuits.streams import graph_of
from gossamer.errors import GossamerError
from gossamer.files import atomic_file
from gossamer.inputs import read_json, read_pickle, reading

FORMATS = (".json", ".pt", ".graphml")

Level = Literal["edges", "nodes", "neurons"]
"""Kind of unit that has scores."""


@dataclass(frozen=True)
class Circuit:
    """Edges of a model's graph with their scores.

    Attributes:
        graph: the model's graph.
        width: d_model of the model.
        scores: edge scores; 0 where the file has none (GraphML has scores of kept edges only).
        kept: which edges are in the circuit.
        node_scores, neuron_scores: scores of the sources and of their neurons; NaN where there is no score.
        neurons: which dimensions of a source's output its kept edges carry; None: all.
        fed: sources that were chosen as a whole and are kept even if no kept edge leads to them; None: there are none.
    """

    graph: Graph
    width: int
    scores: Float[Tensor, "sources destinations"]
    kept: Bool[Tensor, "sources destinations"]
    node_scores: Float[Tensor, " sources"] | None = None
    neuron_scores: Float[Tensor, "sources d_model"] | None = None
    neurons: Bool[Tensor, "sources d_model"] | None = None
    fed: Bool[Tensor, " sources"] | None = None

    @property
    def scored(self) -> tuple[Level, ...]:
        """The levels that have scores."""
        there = {
            "edges": bool(self.scores.any()),
            "nodes": self.node_scores is not None and bool((~self.node_scores.isnan()).any()),
            "neurons": self.neuron_scores is not None and bool((~self.neuron_scores.isnan()).any()),
        }
        return tuple(level for level in get_args(Level) if there[level])

    @property
    def kept_nodes(self) -> Bool[Tensor, " sources"]:
        """Sources with at least one kept outgoing edge."""
        return self.kept.any(1)


def write_circuit(file: Path, circuit: Circuit) -> None:
    """Write a circuit atomically, in the format given by the file's extension.

    Raises:
        GossamerError: on an unknown extension; if the circuit cannot be written.
    """
    write = {".json": _write_json, ".pt": _write_pt, ".graphml": _write_graphml}.get(file.suffix)
    if write is None:
        raise _unknown(file)
    with atomic_file(file) as staging:
        write(staging, _other_sign(circuit))


def read_circuit(file: Path) -> Circuit:
    """Read a circuit; nothing in the file is executed.

    Raises:
        GossamerError: if it cannot be read; names the file and the reason.
    """
    read = {".json": _read_json, ".pt": _read_pt, ".graphml": _read_graphml}.get(file.suffix)
    if read is None:
        raise _unknown(file)
    with reading(file, "export it anew, or give another file"):
        return _other_sign(read(file))


def choose(
    circuit: Circuit, level: Level, count: int, *, absolute: bool = True, name: object = "the circuit"
) -> Circuit:
    """Choose the ``count`` units with the largest absolute scores, or those that help most, as in EAP-IG.

    A chosen node keeps all its outgoing edges. So does a node with a chosen neuron; its edges then carry only the
    chosen neurons. Choosing edges or nodes leaves an earlier choice of neurons unchanged. Nodes and neurons without a
    score are always kept. ``name`` refers to the circuit in error messages.

    Raises:
        GossamerError: if there are no scores of that kind, or edge scores are NaN.
    """
    if level not in circuit.scored:
        there = f"has scores of {' and '.join(circuit.scored)}, none of {level}" if circuit.scored else "has no scores"
        raise GossamerError(f"{name} {there} to choose {count:,} by")
    if level == "edges" and circuit.scores[circuit.graph.possible()].isnan().any():
        raise GossamerError(f"{name} has scores of edges that are no numbers (nan)")
    graph, neurons = circuit.graph, circuit.neurons if circuit.neurons is not None and circuit.neurons.any() else None
    fed = None
    if level == "edges":
        kept = top_edges(graph, circuit.scores, count, absolute=absolute)
    else:
        scores = cast(Tensor, circuit.node_scores if level == "nodes" else circuit.neuron_scores)
        unscored = scores.isnan()
        ranked = (scores.abs() if absolute else -scores).masked_fill(unscored, -torch.inf).flatten()
        chosen = unscored.flatten()
        chosen[torch.argsort(ranked, descending=True, stable=True)[:count]] = True
        chosen = chosen.view_as(scores)
        neurons = chosen if level == "neurons" else neurons
        fed = chosen.any(1) if level == "neurons" else chosen
        kept = graph.possible() & fed[:, None]
    return replace(circuit, kept=kept, neurons=neurons, fed=fed)


def require_graph_of(model: PreTrainedModel, circuit: Circuit, file: Path) -> None:
    """Check that a circuit belongs to the model.

    Raises:
        GossamerError: if it does not; gives the sizes of both.
    """
    graph, width = graph_of(model), model.config.hidden_size
    if (circuit.graph, circuit.width) != (graph, width):
        raise GossamerError(
            f"{file} is a circuit of another model: {_sizes(circuit.graph, circuit.width)}; this model has "
            f"{_sizes(graph, width)}"
        )


def _sizes(graph: Graph, width: int) -> str:
    parallel = ", attention and MLP in parallel" if graph.parallel else ""
    return f"{graph.layers} layers of {graph.heads} heads, width {width}{parallel}"


def _unknown(file: Path) -> GossamerError:
    return GossamerError(f"{file} has to end in {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")


def _other_sign(circuit: Circuit) -> Circuit:
    scores = {name: getattr(circuit, name) for name in ("scores", "node_scores", "neuron_scores")}
    return replace(circuit, **{name: 0.0 - values for name, values in scores.items() if values is not None})


def _settings(circuit: Circuit) -> dict[str, Any]:
    graph = circuit.graph
    return {
        "n_layers": graph.layers,
        "n_heads": graph.heads,
        "parallel_attn_mlp": graph.parallel,
        "d_model": circuit.width,
    }


def _graph(settings: dict[str, Any]) -> tuple[Graph, int]:
    graph = Graph(int(settings["n_layers"]), int(settings["n_heads"]), bool(settings["parallel_attn_mlp"]))
    return graph, int(settings["d_model"])


def _names(graph: Graph) -> tuple[list[str], list[str]]:
    sources = [graph.source_name(source) for source in range(graph.sources)]
    return sources, [graph.destination_name(destination) for destination in range(graph.destinations)]


def _write_json(file: Path, circuit: Circuit) -> None:
    graph = circuit.graph
    sources, destinations = _names(graph)
    nodes: dict[str, dict[str, Any]] = {
        name: {"in_graph": kept} for name, kept in zip(sources, circuit.kept_nodes.tolist(), strict=True)
    }
    for source, node in enumerate(nodes.values()):
        if circuit.node_scores is not None:
            node["score"] = circuit.node_scores[source].item()
        for key, values in (("neurons", circuit.neurons), ("neurons_scores", circuit.neuron_scores)):
            if values is not None:
                node[key] = values[_rows(graph, source)].tolist()
    scores, kept = circuit.scores.tolist(), circuit.kept.tolist()
    edges = {
        f"{sources[u]}->{destinations[v]}": {"score": scores[u][v], "in_graph": kept[u][v]}
        for u, v in graph.possible().nonzero().tolist()
    }
    content = {"cfg": _settings(circuit), "nodes": {**nodes, "logits": {"in_graph": True}}, "edges": edges}
    file.write_text(json.dumps(content), encoding="utf-8")


def _rows(graph: Graph, source: int) -> int | slice:
    """Rows that EAP-IG's JSON stores as a node's neurons: for a head, those of all heads in its layer."""
    layer, place = divmod(source - 1, graph.heads + 1)
    if source == 0 or place == graph.heads:
        return source
    return slice(graph.head(layer, 0), graph.mlp(layer))


def _read_json(file: Path) -> Circuit:
    content: dict[str, Any] = read_json(file, nan=True)
    graph, width = _graph(content["cfg"])
    scores, kept = _empty(graph)
    sources, destinations = ({name: place for place, name in enumerate(names)} for names in _names(graph))
    for name, edge in content["edges"].items():
        source, _, destination = name.partition("->")
        place = sources[source], destinations[destination]
        if edge.get("score") is not None:
            scores[place] = float(edge["score"])
        kept[place] = bool(edge.get("in_graph"))
    nodes = {sources[name]: node for name, node in content.get("nodes", {}).items() if name in sources}
    node_scores = {source: float(node["score"]) for source, node in nodes.items() if _has(node, "score")}
    return _checked(
        graph,
        width,
        scores,
        kept,
        node_scores=_filled(torch.full((graph.sources,), torch.nan), node_scores),
        neuron_scores=_of_neurons(graph, width, nodes, "neurons_scores", torch.nan),
        neurons=_of_neurons(graph, width, nodes, "neurons", 0.0),
    )


def _has(node: Any, key: str) -> bool:
    return isinstance(node, dict) and node.get(key) is not None


def _of_neurons(graph: Graph, width: int, nodes: dict[int, Any], key: str, otherwise: float) -> Tensor | None:
    """Read neuron values from the nodes; a head's entry may hold the rows of all heads in its layer."""
    found = {}
    for source, node in nodes.items():
        if _has(node, key):
            values = torch.tensor(node[key], dtype=torch.float)
            rows = _rows(graph, source)
            if isinstance(rows, slice) and values.ndim == 2:
                values = values[source - rows.start]
            if values.shape != (width,):
                raise ValueError(
                    f"{key} of {graph.source_name(source)} are {tuple(values.shape)}, its cfg wants {width}"
                )
            found[source] = values
    return _filled(torch.full((graph.sources, width), otherwise), found)


def _filled(values: Tensor, found: dict[int, Any]) -> Tensor | None:
    for source, value in found.items():
        values[source] = value
    return values if found else None


def _write_pt(file: Path, circuit: Circuit) -> None:
    sources, destinations = _names(circuit.graph)
    kept = circuit.kept if circuit.fed is None else circuit.kept | circuit.fed[:, None]
    content = {
        "cfg": _settings(circuit),
        "src_nodes": sources,
        "dst_nodes": destinations,
        "edges_scores": circuit.scores.contiguous(),
        "edges_in_graph": kept.contiguous(),
        "nodes_in_graph": kept.any(1),
        "nodes_scores": circuit.node_scores,
        "neurons_in_graph": circuit.neurons,
        "neurons_scores": circuit.neuron_scores,
    }
    torch.save({key: value for key, value in content.items() if value is not None}, file)


def _read_pt(file: Path) -> Circuit:
    content = read_pickle(file)
    graph, width = _graph(content["cfg"])
    sources, destinations = _names(graph)
    if list(content["src_nodes"]) != sources or list(content["dst_nodes"]) != destinations:
        raise ValueError("its nodes are not those of its cfg, or in another order")
    scores, kept = _empty(graph)
    if content.get("edges_scores") is not None:
        scores = content["edges_scores"].float()
    if content.get("edges_in_graph") is not None:
        kept = content["edges_in_graph"].bool()
    possible, fed = graph.possible(), None
    if kept.shape == possible.shape:
        # A node chosen as a whole has a full row, which includes both possible and backward edges.
        whole = (kept & possible).any(1) & (kept & ~possible).any(1)
        kept = kept & (possible | ~whole[:, None])
        fed = whole if whole.any() else None
    return _checked(
        graph,
        width,
        scores,
        kept,
        node_scores=_floats(content.get("nodes_scores")),
        neuron_scores=_floats(content.get("neurons_scores")),
        neurons=_floats(content.get("neurons_in_graph")),
        fed=fed,
    )


def _floats(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.float()


def _write_graphml(file: Path, circuit: Circuit) -> None:
    if circuit.neurons is not None:
        raise GossamerError("GraphML has no place for neurons; write .json or .pt")
    graph = circuit.graph
    sources, destinations = _names(graph)
    drawn = networkx.MultiDiGraph(**_settings(circuit))
    for u, v in circuit.kept.nonzero().tolist():
        owner, _, kind = destinations[v].rstrip(">").partition("<")
        for name in (sources[u], owner):
            drawn.add_node(name, layer=_layer(graph, name))
        drawn.add_edge(sources[u], owner, key=kind or "in", score=circuit.scores[u, v].item())
    networkx.write_graphml(drawn, file)


def _layer(graph: Graph, name: str) -> int:
    if name in ("input", "logits"):
        return -1 if name == "input" else graph.layers
    return int(name[1:].partition(".")[0])


def _read_graphml(file: Path) -> Circuit:
    drawn = networkx.read_graphml(file, force_multigraph=True)
    graph, width = _graph(drawn.graph)
    scores, kept = _empty(graph)
    sources, destinations = ({name: place for place, name in enumerate(names)} for names in _names(graph))
    for source, owner, kind, data in drawn.edges(keys=True, data=True):
        place = sources[source], destinations[owner if kind == "in" else f"{owner}<{kind}>"]
        scores[place], kept[place] = float(data["score"]), True
    return _checked(graph, width, scores, kept)


def _empty(graph: Graph) -> tuple[Tensor, Tensor]:
    shape = graph.sources, graph.destinations
    return torch.zeros(shape), torch.zeros(shape, dtype=torch.bool)


def _checked(
    graph: Graph,
    width: int,
    scores: Tensor,
    kept: Tensor,
    *,
    node_scores: Tensor | None = None,
    neuron_scores: Tensor | None = None,
    neurons: Tensor | None = None,
    fed: Tensor | None = None,
) -> Circuit:
    shape, by_neuron = (graph.sources, graph.destinations), (graph.sources, width)
    for name, values, wanted in (
        ("edges", scores, shape),
        ("edges", kept, shape),
        ("node scores", node_scores, shape[:1]),
        ("neuron scores", neuron_scores, by_neuron),
        ("neurons", neurons, by_neuron),
    ):
        if values is not None and values.shape != wanted:
            raise ValueError(f"its {name} are {tuple(values.shape)}, its cfg wants {wanted}")
    if (kept & ~graph.possible()).any():
        raise ValueError("it has edges that lead backwards")
    chosen = None if neurons is None else neurons.bool()
    return Circuit(graph, width, scores, kept, node_scores, neuron_scores, chosen, fed)
