"""Circuits in files that other tools read, and back.

``.json`` and ``.pt`` are those of EAP-IG (hannamw/EAP-IG on GitHub), which the MIB leaderboard takes; ``.graphml``
holds the circuit's own nodes and edges only, for networkx, Gephi or Cytoscape.

Scores in files have EAP-IG's sign: it attributes a loss, the metric times -1, so that what helps has a positive score.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from xml.etree.ElementTree import ParseError

import networkx
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel

from gossamer.circuits.graph import Graph
from gossamer.circuits.streams import graph_of
from gossamer.errors import GossamerError
from gossamer.files import file_beside

FORMATS = (".json", ".pt", ".graphml")


@dataclass(frozen=True)
class Circuit:
    """Edges of a model's graph with their scores.

    Attributes:
        graph: of the model.
        width: its d_model.
        scores: of the edges; in GraphML, of the kept ones alone.
        kept: which of them are in the circuit.
    """

    graph: Graph
    width: int
    scores: Float[Tensor, "sources destinations"]
    kept: Bool[Tensor, "sources destinations"]

    @property
    def kept_nodes(self) -> Bool[Tensor, " sources"]:
        """Sources at which kept edges begin."""
        return self.kept.any(1)


def write_circuit(file: Path, circuit: Circuit) -> None:
    """Write a circuit in the format that the file's name says, whole or not at all.

    Raises:
        GossamerError: on another ending; if it cannot be written.
    """
    write = {".json": _write_json, ".pt": _write_pt, ".graphml": _write_graphml}.get(file.suffix)
    if write is None:
        raise _unknown(file)
    try:
        with file_beside(file) as staging:
            write(staging, _other_sign(circuit))
    except OSError as error:
        raise GossamerError(f"cannot write {file}: {error.strerror or error}") from error


def read_circuit(file: Path) -> Circuit:
    """Read a circuit; nothing in the file is executed.

    Raises:
        GossamerError: naming the file and what is wrong with it.
    """
    read = {".json": _read_json, ".pt": _read_pt, ".graphml": _read_graphml}.get(file.suffix)
    if read is None:
        raise _unknown(file)
    try:
        return _other_sign(read(file))
    except OSError as error:
        raise GossamerError(f"cannot read {file}: {error.strerror or error}") from error
    except (ParseError, UnpicklingError, EOFError, RuntimeError, networkx.NetworkXError) as error:
        raise GossamerError(f"{file} is not a {file.suffix} file: {' '.join(str(error).split())[:100]}") from error
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise GossamerError(f"{file} is no graph in EAP-IG's format: {type(error).__name__}: {error}") from error


def require_graph_of(model: PreTrainedModel, circuit: Circuit, file: Path) -> None:
    """Refuse a circuit of another model.

    Raises:
        GossamerError: with the sizes of both.
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
    return replace(circuit, scores=0.0 - circuit.scores)


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
    sources, destinations = _names(circuit.graph)
    nodes = {name: {"in_graph": kept} for name, kept in zip(sources, circuit.kept_nodes.tolist(), strict=True)}
    scores, kept = circuit.scores.tolist(), circuit.kept.tolist()
    edges = {
        f"{sources[u]}->{destinations[v]}": {"score": scores[u][v], "in_graph": kept[u][v]}
        for u, v in circuit.graph.possible().nonzero().tolist()
    }
    content = {"cfg": _settings(circuit), "nodes": {**nodes, "logits": {"in_graph": True}}, "edges": edges}
    file.write_text(json.dumps(content), encoding="utf-8")


def _read_json(file: Path) -> Circuit:
    content = json.loads(file.read_text(encoding="utf-8"))
    graph, width = _graph(content["cfg"])
    scores, kept = _empty(graph)
    sources, destinations = ({name: place for place, name in enumerate(names)} for names in _names(graph))
    for name, edge in content["edges"].items():
        source, _, destination = name.partition("->")
        place = sources[source], destinations[destination]
        scores[place], kept[place] = float(edge["score"]), bool(edge["in_graph"])
    return _checked(graph, width, scores, kept)


def _write_pt(file: Path, circuit: Circuit) -> None:
    sources, destinations = _names(circuit.graph)
    content = {
        "cfg": _settings(circuit),
        "src_nodes": sources,
        "dst_nodes": destinations,
        "edges_scores": circuit.scores.contiguous(),
        "edges_in_graph": circuit.kept.contiguous(),
        "nodes_in_graph": circuit.kept_nodes,
    }
    torch.save(content, file)


def _read_pt(file: Path) -> Circuit:
    content = torch.load(file, weights_only=True, map_location="cpu")
    graph, width = _graph(content["cfg"])
    sources, destinations = _names(graph)
    if list(content["src_nodes"]) != sources or list(content["dst_nodes"]) != destinations:
        raise ValueError("its nodes are not those of its cfg, or in another order")
    return _checked(graph, width, content["edges_scores"].float(), content["edges_in_graph"].bool())


def _write_graphml(file: Path, circuit: Circuit) -> None:
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


def _checked(graph: Graph, width: int, scores: Tensor, kept: Tensor) -> Circuit:
    shape = graph.sources, graph.destinations
    if scores.shape != shape or kept.shape != shape:
        raise ValueError(f"its edges are {tuple(scores.shape)}, its cfg wants {shape}")
    if (kept & ~graph.possible()).any():
        raise ValueError("it has edges that lead backwards")
    return Circuit(graph, width, scores, kept)
