"""Records of circuits: their folder, the settings they were found with, and loading a circuit from one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gossamer.circuits.circuit_files import Circuit
from gossamer.circuits.graph import Graph, prune, top_edges
from gossamer.circuits.tasks.base import Task
from gossamer.errors import GossamerError
from gossamer.inputs import read_json, read_tensors, reading
from gossamer.runs.read import SEARCH, read_circuits


def circuit_folder(root: Path, task: Task, corruption: str, ablation: str) -> Path:
    """Folder of the record below ``root``, which is a run's directory or another one."""
    if task.name.startswith(".") or "/" in task.name or not task.name.strip():
        raise GossamerError(f"a task called {task.name!r} cannot have a record of that name; give it another name")
    parts = [task.name]
    if corruption != task.corruptions[0]:
        parts.append(corruption)
    if ablation != "patch":
        parts.append(ablation)
    return root / "circuits" / "-".join(parts)


def identity(task: Task, corruption: str, ablation: str) -> dict[str, Any]:
    """What identifies a record; the folder's name alone is ambiguous."""
    return {
        "task": task.name,
        "file_checksum": task.file_checksum,
        "corruption": corruption,
        "ablation": ablation,
        "metric": task.metric,
    }


_OTHERWISE = {
    "file_checksum": "in another file, or in what stood in it before",
    "checksum": "on other prompts",
    "answers_checksum": "with other answers to the prompts",
}


def _difference(record: Mapping[str, Any], settings: Mapping[str, Any]) -> str | None:
    """Describe the first setting in which a record differs; None if it differs in none."""
    for key, value in settings.items():
        if key in record and record[key] != value:
            return _OTHERWISE.get(key) or f"with {key} {record[key]}, not {value}"
    return None


def check_record(folder: Path, settings: dict[str, Any]) -> None:
    """Raise an error if a new record would overwrite one made with other settings."""
    try:
        before: dict[str, Any] = read_json(folder / "circuits.json")
    except GossamerError:  # there is no record, or it is damaged
        return
    if "ig_steps" in before:  # Older records have the number of EAP-IG steps instead of the score's name.
        before["score"] = {0: "eap", 5: "eap-ig-inputs"}.get(
            before["ig_steps"], f"{before['ig_steps']} steps of EAP-IG"
        )
    if difference := _difference(before, settings):
        raise GossamerError(f"{folder} holds circuits found {difference}; --replace puts the new ones in their place")


def load_circuit(
    root: Path,
    task: Task,
    model: str,
    edges: int | None = None,
    *,
    corruption: str | None = None,
    ablation: str = "patch",
) -> Circuit:
    """Load a pruned circuit of edges from a record of :func:`gossamer.circuits.compare.compare_circuits`.

    Args:
        root: the directory of a run whose circuits have been found, or ``--out`` of ``gossamer circuits``.
        task: the task.
        model: ``dense`` or ``sparse``.
        edges: how many of the best edges to keep; None: as many as explain 90 %.
        corruption: kind of corrupted prompts with which the circuit was found; the task's first if None.
        ablation: ablation under which it was found.

    Raises:
        GossamerError: if there is no such record, or the folder holds the record of another task; if the circuits were
            found without edges; if no circuit explains 90 % and ``edges`` is None.
    """
    corruption = corruption or task.corruptions[0]
    folder = circuit_folder(root, task, corruption, ablation)
    if not (folder / "circuits.json").exists():
        raise GossamerError(f"{root} has no circuits of {folder.name}; find them with gossamer circuits")
    record = read_circuits(folder)
    with reading(folder, SEARCH):
        if difference := _difference(record, identity(task, corruption, ablation)):
            raise GossamerError(
                f"{folder} holds circuits found {difference}; find those of {task.name} with gossamer circuits"
            )
        units = record["models"][model]["units"]
        if "edges" not in record["models"][model]["levels"]:
            raise GossamerError(f"the circuits of {folder.name} in {root} were found without edges; find those too")
        size = edges if edges is not None else record["models"][model]["levels"]["edges"]["first_size"]
        graph = Graph(units["layers"], units["heads"], units["parallel"])
        shape = graph.sources, graph.destinations
        scores = read_tensors(folder / "scores.safetensors", {"dense": shape, "sparse": shape}, remedy=SEARCH)[model]
        width, absolute = units["width"], record["selection"].startswith("largest")
    if size is None:
        raise GossamerError(f"no circuit of {folder.name} that was measured explains 90 %; say how many edges to keep")
    kept = prune(graph, top_edges(graph, scores, size, absolute=absolute))
    return Circuit(graph, width, scores, kept)
