"""Circuits written for other tools and read back; the files as EAP-IG's own code would take them."""

import json
import pickle
from pathlib import Path

import networkx
import pytest
import torch

from families import tiny_model
from gossamer.circuits.graph import Graph, prune, top_edges
from gossamer.circuits.interchange import Circuit, read_circuit, require_graph_of, write_circuit
from gossamer.errors import GossamerError


@pytest.fixture(params=[False, True], ids=["serial", "parallel"])
def circuit(request: pytest.FixtureRequest) -> Circuit:
    graph = Graph(3, 2, parallel=request.param)
    scores = torch.randn(graph.sources, graph.destinations, generator=torch.Generator().manual_seed(0))
    scores = scores * graph.possible()
    return Circuit(graph, 32, scores, prune(graph, top_edges(graph, scores, 20)))


@pytest.mark.parametrize("suffix", [".json", ".pt", ".graphml"])
def test_what_is_written_is_read_back(circuit: Circuit, suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"circuit{suffix}"
    write_circuit(file, circuit)
    found = read_circuit(file)
    assert (found.graph, found.width) == (circuit.graph, circuit.width)
    assert torch.equal(found.kept, circuit.kept)
    scores = circuit.scores if suffix != ".graphml" else circuit.scores * circuit.kept
    assert torch.equal(found.scores, scores)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_the_json_file_has_eap_igs_keys(circuit: Circuit, tmp_path: Path) -> None:
    write_circuit(tmp_path / "c.json", circuit)
    content = json.loads((tmp_path / "c.json").read_text())
    parallel = circuit.graph.parallel
    assert content["cfg"] == {"n_layers": 3, "n_heads": 2, "parallel_attn_mlp": parallel, "d_model": 32}
    assert list(content["nodes"])[:4] == ["input", "a0.h0", "a0.h1", "m0"]
    assert set(content["edges"]["input->a1.h0<q>"]) == {"score", "in_graph"}
    assert ("a1.h0->m1" in content["edges"]) != parallel
    assert len(content["edges"]) == int(circuit.graph.possible().sum())
    score = content["edges"]["input->a1.h0<q>"]["score"]
    assert score == pytest.approx(-circuit.scores[0, circuit.graph.read(1, "q")].item())
    in_graph = {name for name, edge in content["edges"].items() if edge["in_graph"]}
    assert len(in_graph) == int(circuit.kept.sum())
    assert {name.partition("->")[0] for name in in_graph} == {
        name for name, node in content["nodes"].items() if node["in_graph"] and name != "logits"
    }


def test_the_pt_file_has_eap_igs_keys(circuit: Circuit, tmp_path: Path) -> None:
    write_circuit(tmp_path / "c.pt", circuit)
    content = torch.load(tmp_path / "c.pt", weights_only=True)
    assert set(content) == {
        "cfg", "src_nodes", "dst_nodes", "edges_scores", "edges_in_graph", "nodes_in_graph"
    }  # fmt: skip
    assert content["edges_scores"].shape == content["edges_in_graph"].shape == (10, 22)
    assert content["dst_nodes"][:7] == ["a0.h0<q>", "a0.h1<q>", "a0.h0<k>", "a0.h1<k>", "a0.h0<v>", "a0.h1<v>", "m0"]
    assert content["src_nodes"][-1] == "m2"


def test_networkx_sees_the_paths(circuit: Circuit, tmp_path: Path) -> None:
    write_circuit(tmp_path / "c.graphml", circuit)
    drawn = networkx.read_graphml(tmp_path / "c.graphml", force_multigraph=True)
    assert drawn.number_of_edges() == int(circuit.kept.sum())
    assert networkx.is_directed_acyclic_graph(drawn)
    for node in drawn:  # the circuit is pruned: every node lies between input and logits
        assert networkx.has_path(drawn, "input", node)
        assert networkx.has_path(drawn, node, "logits")


class Harm:
    def __reduce__(self):
        return Path.touch, (Path("harmed"),)


def test_files_that_are_no_graphs_are_refused(circuit: Circuit, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"cfg": Harm()}, "harm.pt")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Harm()))
    (tmp_path / "cut.json").write_text('{"cfg": {')
    (tmp_path / "other.json").write_text('{"nodes": {}}')
    (tmp_path / "text.graphml").write_text("no xml")
    (tmp_path / "circuit.txt").write_text("")
    graph = circuit.graph
    backwards = Circuit(graph, 32, circuit.scores, ~graph.possible())
    write_circuit(tmp_path / "backwards.pt", backwards)
    for name in ("harm.pt", "pickle.pt", "cut.json", "other.json", "text.graphml", "circuit.txt", "backwards.pt",
                 "missing.json"):  # fmt: skip
        with pytest.raises(GossamerError, match=name):
            read_circuit(tmp_path / name)
    assert not (tmp_path / "harmed").exists()
    with pytest.raises(GossamerError, match="cannot write"):
        write_circuit(tmp_path / "no" / "circuit.json", circuit)


def test_a_graph_of_another_model_is_refused() -> None:
    model = tiny_model("llama")
    graph = Graph(3, 4)
    nothing = torch.zeros(graph.sources, graph.destinations)
    require_graph_of(model, Circuit(graph, 32, nothing, nothing.bool()), Path("c.pt"))
    for other, width in ((Graph(3, 3), 32), (Graph(2, 4), 32), (graph, 64), (Graph(3, 4, parallel=True), 32)):
        with pytest.raises(GossamerError, match=r"c\.pt is a circuit of another model: .* has 3 layers of 4"):
            require_graph_of(model, Circuit(other, width, nothing, nothing.bool()), Path("c.pt"))
