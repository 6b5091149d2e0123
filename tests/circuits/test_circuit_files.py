"""Circuits written for other tools and read back; the files have the layout that EAP-IG reads."""

import json
import pickle
import resource
from dataclasses import replace
from pathlib import Path

import networkx
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from families import tiny_model
from gossamer.circuits.ablations import ABLATIONS
from gossamer.circuits.circuit_files import Circuit, choose, read_circuit, require_graph_of, write_circuit
from gossamer.circuits.graph import Graph, between_nodes, prune, top_edges
from gossamer.circuits.search import faithfulness_of
from gossamer.circuits.tasks.base import Example, Prompts, TokenizedExample
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
    for node in drawn:  # the circuit is pruned: every node is on a path from the input to the logits
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


@pytest.fixture(scope="module")
def model() -> GPT2LMHeadModel:
    """A model with one layer of two heads."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2, attn_implementation="eager")
        model = GPT2LMHeadModel(config).double().eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    return model


SOURCES = ("input", "a0.h0", "a0.h1", "m0")
DESTINATIONS = ("a0.h0<q>", "a0.h1<q>", "a0.h0<k>", "a0.h1<k>", "a0.h0<v>", "a0.h1<v>", "m0", "logits")
READ = {**dict.fromkeys(DESTINATIONS[:6], 1), "m0": 3, "logits": 4}
"""Number of sources, counted from the first, that each destination reads."""


def written(model: GPT2LMHeadModel, ids: torch.Tensor, carried=None, other=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute in plain PyTorch the output of each source and the logits at the last position.

    For each source, a destination reads the output in ``other`` plus the share ``carried``,
    ``[sources, destinations, d_model]``, of the difference from it.
    """
    body, layer = model.transformer, model.transformer.h[0]
    own = [body.wte(ids) + body.wpe(torch.arange(ids.shape[1]))]

    def stream(name: str) -> torch.Tensor:
        total = layer.attn.c_proj.bias * (name in ("m0", "logits"))
        for u in range(READ[name]):
            share = 1.0 if carried is None else carried[u, DESTINATIONS.index(name)]
            rest = torch.zeros_like(own[u]) if other is None else other[u]
            total = total + rest + share * (own[u] - rest)
        return total

    def projected(head: int, kind: str) -> torch.Tensor:
        first = "qkv".index(kind) * 8 + head * 4
        weight, bias = layer.attn.c_attn.weight[:, first : first + 4], layer.attn.c_attn.bias[first : first + 4]
        return layer.ln_1(stream(f"a0.h{head}<{kind}>")) @ weight + bias

    later = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
    for head in range(2):
        q, k, v = (projected(head, kind) for kind in "qkv")
        weights = (q @ k.mT / 2).masked_fill(later, -torch.inf).softmax(-1)
        own.append(weights @ v @ layer.attn.c_proj.weight[head * 4 : head * 4 + 4])
    own.append(layer.mlp(layer.ln_2(stream("m0"))))
    return torch.stack(own), model.lm_head(body.ln_f(stream("logits")))[:, -1]


@torch.no_grad()
def faithfulness_by_hand(model: GPT2LMHeadModel, prompts: Prompts, carried: torch.Tensor, ablation: str) -> float:
    clean, corrupted = (torch.stack([getattr(t, kind) for t in prompts.kept]) for kind in ("clean", "corrupted"))
    other = written(model, corrupted)[0]
    other = {"patch": other, "zero": 0 * other, "mean": other.mean(1, keepdim=True).expand_as(other)}[ablation]
    values = []
    for shares in (torch.zeros_like(carried), carried, torch.ones_like(carried)):
        logits = written(model, clean, shares, other)[1]
        values.append((logits[:, 5] - logits[:, 6]).mean().item())
    return (values[1] - values[0]) / (values[2] - values[0])


def prompts_of_numbers() -> Prompts:
    example, draw = Example("", "", ("",), ("",)), torch.Generator().manual_seed(1)
    ids = torch.randint(20, (4, 2, 6), generator=draw)
    kept = [
        TokenizedExample(example, clean, corrupted, torch.tensor([5]), torch.tensor([6])) for clean, corrupted in ids
    ]
    return Prompts("logit_difference", tuple(kept), ())


def eap_ig_file(file: Path, edges: torch.Tensor, neurons: torch.Tensor | None = None, form: str = "") -> None:
    """Write a graph in the layout of EAP-IG's to_pt and to_json: a full matrix, or real edges by name."""
    cfg = {"n_layers": 1, "n_heads": 2, "parallel_attn_mlp": False, "d_model": 8}
    if file.suffix == ".pt":
        content = {
            "cfg": cfg,
            "src_nodes": list(SOURCES),
            "dst_nodes": list(DESTINATIONS),
            "edges_scores": torch.zeros(4, 8),
            "edges_in_graph": edges,
            "nodes_in_graph": edges.any(1),
        }
        torch.save(content if neurons is None else {**content, "neurons_in_graph": neurons}, file)
        return
    nodes = {name: {"in_graph": bool(edges[u].any())} for u, name in enumerate(SOURCES)}
    for u, name in enumerate(SOURCES if neurons is not None else ()):
        whole_layer = name.startswith("a") and form == "by layer"
        nodes[name]["neurons"] = neurons[slice(1, 3) if whole_layer else u].tolist()
    names = {
        f"{SOURCES[u]}->{name}": {"in_graph": bool(edges[u, v])} | ({} if form == "no scores" else {"score": 0.0})
        for v, name in enumerate(DESTINATIONS)
        for u in range(READ[name])
    }
    file.write_text(json.dumps({"cfg": cfg, "nodes": {**nodes, "logits": {"in_graph": True}}, "edges": names}))


def real() -> torch.Tensor:
    return torch.tensor([[u < READ[name] for name in DESTINATIONS] for u in range(4)])


NEURONS = {
    "one of each": torch.arange(8)[None] == torch.tensor([[3], [0], [5], [7]]),
    "some": torch.rand(4, 8, generator=torch.Generator().manual_seed(2)) < 0.5,
    "those of one head": torch.tensor([[True], [False], [True], [True]]).expand(4, 8),
    "all": torch.ones(4, 8, dtype=torch.bool),
}


@pytest.mark.parametrize("ablation", ["patch", "zero"])
@pytest.mark.parametrize("form", [".pt", ".json", ".json by layer"])
@pytest.mark.parametrize("chosen", NEURONS)
def test_kept_edges_carry_the_neurons_that_are_chosen(
    chosen: str, form: str, ablation: str, model: GPT2LMHeadModel, tmp_path: Path
) -> None:
    neurons, prompts = NEURONS[chosen], prompts_of_numbers()
    torch.manual_seed(3)
    for edges in (real(), real() & (torch.rand(4, 8) < 0.8)):
        edges[0, :] = real()[0]  # nothing may be cut off
        edges[:, -1] = True
        suffix, _, layout = form.partition(" ")
        eap_ig_file(tmp_path / f"graph{suffix}", edges, neurons, layout)
        found = read_circuit(tmp_path / f"graph{suffix}")
        assert torch.equal(found.kept, edges)
        assert torch.equal(found.neurons, neurons)
        point = faithfulness_of(model, prompts, found.kept, neurons=found.neurons, ablation=ablation, batch_size=3)
        wanted = faithfulness_by_hand(model, prompts, (edges[:, :, None] & neurons[:, None]).double(), ablation)
        assert point.faithfulness == pytest.approx(wanted, abs=1e-5)
        assert (wanted == pytest.approx(1)) == (chosen == "all" and edges.equal(real()))


def test_eap_ig_lets_chosen_neurons_through_all_edges_between_nodes(model: GPT2LMHeadModel) -> None:
    """EAP-IG's evaluate_graph corrupts an edge by (1 - neuron) (1 - edge of a node that is chosen as a whole)."""
    neurons, prompts, edges = NEURONS["one of each"], prompts_of_numbers(), real()
    edges[0, 6] = edges[1, 7] = False
    whole = neurons.all(1).double()
    corrupted = (1 - neurons.double())[:, None] * (1 - edges.double() * whole[:, None])[:, :, None]
    wanted = faithfulness_by_hand(model, prompts, 1 - corrupted, "patch")
    every = between_nodes(Graph(1, 2), edges)
    assert faithfulness_of(model, prompts, every, neurons=neurons).faithfulness == pytest.approx(wanted, abs=1e-5)
    assert faithfulness_of(model, prompts, edges, neurons=neurons).faithfulness != pytest.approx(wanted, abs=1e-3)


def test_nodes_chosen_as_a_whole_have_rows_of_edges_that_do_not_exist(model: GPT2LMHeadModel, tmp_path: Path) -> None:
    edges = torch.zeros(4, 8, dtype=torch.bool)
    edges[[0, 2, 3]] = True  # apply_topn(level="node") on input, a0.h1 and m0; below, before and after prune()
    for columns in (range(8), (1, 3, 5, 6, 7)):
        pruned = edges & (torch.arange(8)[None] == torch.tensor(columns)[:, None]).any(0)
        eap_ig_file(tmp_path / "nodes.pt", pruned)
        found = read_circuit(tmp_path / "nodes.pt")
        point = faithfulness_of(model, prompts_of_numbers(), found.kept)
        carried = (edges & real())[:, :, None].double().expand(4, 8, 8)
        assert point.faithfulness == pytest.approx(
            faithfulness_by_hand(model, prompts_of_numbers(), carried, "patch"), abs=1e-5
        )


@pytest.mark.parametrize("ablation", ABLATIONS)
@pytest.mark.parametrize("chosen", [[1, 3], [2], [0, 1, 2, 3], [0, 2]])
def test_nodes_chosen_as_a_whole_stay_where_nothing_feeds_them(
    chosen: list[int], ablation: str, model: GPT2LMHeadModel, tmp_path: Path
) -> None:
    """EAP-IG's prune() also counts edges that lead backwards, so a chosen node always has an incoming edge."""
    edges = torch.zeros(4, 8, dtype=torch.bool)
    edges[chosen] = True
    eap_ig_file(tmp_path / "nodes.pt", edges)
    found, prompts = read_circuit(tmp_path / "nodes.pt"), prompts_of_numbers()
    carried = (edges & real())[:, :, None].double().expand(4, 8, 8)
    wanted = faithfulness_by_hand(model, prompts, carried, ablation)
    for circuit in (found, rewritten(found, tmp_path / "again.pt"), chosen_by_score(chosen)):
        point = faithfulness_of(model, prompts, circuit.kept, fed=circuit.fed, ablation=ablation)
        assert point.faithfulness == pytest.approx(wanted, abs=1e-5)


def rewritten(circuit: Circuit, file: Path) -> Circuit:
    write_circuit(file, circuit)
    return read_circuit(file)


def chosen_by_score(chosen: list[int]) -> Circuit:
    scores = torch.tensor([2.0 if source in chosen else 1.0 for source in range(4)])
    nothing = torch.zeros(4, 8)
    return choose(Circuit(Graph(1, 2), 8, nothing, nothing.bool(), scores), "nodes", len(chosen))


def test_a_circuit_without_scores_is_one_of_mibs_forms(tmp_path: Path) -> None:
    edges = real()
    edges[0, 2] = False
    eap_ig_file(tmp_path / "circuit.json", edges, form="no scores")
    assert torch.equal(read_circuit(tmp_path / "circuit.json").kept, edges)


@pytest.mark.parametrize("suffix", [".json", ".pt"])
def test_scores_alone_say_what_to_choose(suffix: str, tmp_path: Path) -> None:
    """Scores in files are scores of a loss: units with the largest help most. Units without a score stay."""
    graph, nan = Graph(1, 2), torch.nan
    nothing = torch.zeros(4, 8)
    nodes = torch.tensor([0.1, -0.4, 0.3, nan])
    neurons = torch.full((4, 8), nan)
    neurons[1, :3], neurons[2] = torch.tensor([5.0, -7.0, 1.0]), 0.5
    scores = torch.zeros(4, 8)
    scores[0, 0], scores[1, 7], scores[3, 7] = 2.0, -3.0, 1.0
    written = Circuit(graph, 8, -scores, nothing.bool(), -nodes, -neurons)
    write_circuit(tmp_path / f"scores{suffix}", written)
    found = read_circuit(tmp_path / f"scores{suffix}")
    assert found.scored == ("edges", "nodes", "neurons")
    assert not found.kept.any()

    def rows(*sources: int) -> torch.Tensor:
        return torch.tensor([[u in sources] * 8 for u in range(4)]) & real()

    for absolute, edge, head in ((True, [1, 7], 1), (False, [0, 0], 2)):
        assert choose(found, "edges", 1, absolute=absolute).kept.nonzero().tolist() == [edge]
        assert torch.equal(choose(found, "nodes", 1, absolute=absolute).kept, rows(head, 3))
    chosen = choose(found, "neurons", 2)
    wanted = neurons.isnan()
    wanted[1, :2] = True
    assert torch.equal(chosen.neurons, wanted)
    assert torch.equal(chosen.kept, rows(0, 1, 3))
    write_circuit(tmp_path / f"chosen{suffix}", chosen)
    again = read_circuit(tmp_path / f"chosen{suffix}")
    assert torch.equal(again.kept, chosen.kept)
    assert torch.equal(again.neurons, wanted)
    assert torch.equal(again.neuron_scores.isnan(), neurons.isnan())
    with pytest.raises(GossamerError, match="no place for neurons"):
        write_circuit(tmp_path / "chosen.graphml", chosen)
    assert torch.equal(choose(again, "edges", 1).neurons, wanted)  # the file has chosen neurons, so they are kept
    assert choose(replace(found, neurons=nothing.bool()), "edges", 1).neurons is None  # no neurons were chosen
    only = Circuit(graph, 8, nothing, nothing.bool(), nodes)
    with pytest.raises(GossamerError, match=r"c\.pt has scores of nodes, none of edges to choose 3 by"):
        choose(only, "edges", 3, name="c.pt")
    with pytest.raises(GossamerError, match="no numbers"):
        choose(Circuit(graph, 8, scores + nan, nothing.bool()), "edges", 3)


def test_neurons_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    for suffix in (".json", ".pt"):
        eap_ig_file(tmp_path / f"graph{suffix}", real(), torch.ones(4, 7, dtype=torch.bool))
        with pytest.raises(GossamerError, match=rf"graph\{suffix}.*neurons.*\(.*7,?\), its cfg wants"):
            read_circuit(tmp_path / f"graph{suffix}")


def test_a_graph_of_another_model_is_refused() -> None:
    model = tiny_model("llama")
    graph = Graph(3, 4)
    nothing = torch.zeros(graph.sources, graph.destinations)
    require_graph_of(model, Circuit(graph, 32, nothing, nothing.bool()), Path("c.pt"))
    for other, width in ((Graph(3, 3), 32), (Graph(2, 4), 32), (graph, 64), (Graph(3, 4, parallel=True), 32)):
        with pytest.raises(GossamerError, match=r"c\.pt is a circuit of another model: .* has 3 layers of 4"):
            require_graph_of(model, Circuit(other, width, nothing, nothing.bool()), Path("c.pt"))


@pytest.mark.parametrize("suffix", [".json", ".pt", ".graphml"])
def test_a_disk_that_takes_no_more_is_named_and_nothing_is_left(circuit: Circuit, suffix: str, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(GossamerError, match=rf"cannot write .*circuit\{suffix}"):
            write_circuit(tmp_path / f"circuit{suffix}", circuit)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())
