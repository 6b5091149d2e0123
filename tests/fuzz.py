"""Commands on damaged files and with odd options. A seed determines a case; faults in how it ends are listed."""

import io
import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from gossamer.cli import main

SECONDS = 60
"""Time limit of a case, in seconds."""

_RUN = "--config settings.yaml --seq-len 16 --tokens 128"

COMMANDS: tuple[tuple[int, str], ...] = (
    (3, f"sparsify model --text text.jsonl --out new {_RUN}"),
    (2, f"sparsify model --text text.jsonl --out new {_RUN} --train lora --no-control"),
    (2, f"sparsify model --text text.jsonl --out new {_RUN} --start-from run"),
    (1, f"sparsify model --text texts --out new {_RUN} --stream --constraint kl"),
    (3, f"sparsify model --text text.jsonl --out begun {_RUN} --resume"),
    (1, f"sparsify model --text text.jsonl --out run {_RUN}"),
    (5, "evaluate run"),
    (3, "evaluate run --lengths 8,16 --held-out-tokens 32"),
    (6, "inspect run"),
    (4, "inspect run/model"),
    (3, "inspect model"),
    (6, "report run --out page.html"),
    (2, "report run --out page.html --tokens 8"),
    (3, "view run sparse,model --out page.html"),
    (4, "task own.jsonl --model run --examples 2"),
    (2, "task own.jsonl --model run/model --examples 2"),
    (3, "task own.jsonl --model adapter --examples 2"),
    (4, "circuits run --task own.jsonl --examples 2 --score eap --levels edges --force --ablation zero"),
    (2, "circuits run --task own.jsonl --examples 2 --score eap --levels edges --force --replace"),
    (2, "circuits run/model --dense model --task own.jsonl --examples 2 --score eap --levels edges --force --out new"),
    (1, "evaluate run --tasks tiny --task-path tasks --limit 2"),
    (2, "inspect adapter"),
    (5, "export run --task own.jsonl --edges 5 --out circuit.pt"),
    (5, "evaluate-circuit circuit.json --model run --task own.jsonl --examples 2 --force"),
    (3, "evaluate-circuit scores.pt --model run --task own.jsonl --examples 2 --force --edges 9"),
    (3, "evaluate-circuit circuit.graphml --model run --task own.jsonl --examples 2 --force"),
    (4, "compare run/model --text text.jsonl --dense model --seq-len 16 --tokens 64"),
    (2, "compare run --text text.jsonl --seq-len 16 --tokens 64"),
    (2, "compare adapter --text text.jsonl --seq-len 16 --tokens 64"),
    (5, "import checkpoint.pt --out new --heads 4 --tokenizer model"),
    (5, "merge adapter --model model --out new"),
    (1, "explain run sparse,model,reads --seeds 1 --out page.html"),
    (1, "settings"),
    (1, "launch-file ddp"),
)
"""Relative frequencies and commands; their paths are those of the folder of test files (the world)."""

ODD = (
    "-1", "0", "1", "3", "1e300", "nan", "-inf", "99999999999999999999", "", " ", "x", "\udcff", "💥", "a" * 300,
    "/proc/x", ".", "..", "none.txt", "nobody/nothing", "model", "run", "run/model", "adapter", "own.jsonl",
    "text.jsonl", "..jsonl", "model/config.json", "true", "a,b", "[1]", "--resume",
)  # fmt: skip
"""Values that replace an argument."""

OPTIONS = (
    "--seed", "--precision", "--tokens", "--batch-size", "--seq-len", "--lengths", "--corruption", "--levels",
    "--score", "--ablation", "--edges", "--examples", "--seeds", "--model", "--out", "--text", "--constraint",
    "--slack", "--tau", "--epsilon", "--train", "--start-from", "--preset", "--config", "--target", "--against",
    "--share", "--figures", "--tokenizer", "--heads", "--vocab-size", "--dense", "--report-to", "--no-such",
)  # fmt: skip
"""Options that are appended to a command with an odd value."""

LEAVES = (None, -1, 0, 10**30, 1e300, "x", "", [], {}, True, float("nan"), [[1, 2]], {"a": 1}, "💥")
"""Values that replace a value in a record."""


@dataclass
class Case:
    """One command on a copy of the world.

    Attributes:
        seed: determines the case.
        line: the arguments.
        done: descriptions of the damage to files.
    """

    seed: int
    line: list[str] = field(default_factory=list)
    done: list[str] = field(default_factory=list)
    foreign: bool = False

    def __str__(self) -> str:
        return f"seed {self.seed}: {' '.join(map(ascii, self.line))}; {', '.join(self.done) or 'nothing damaged'}"


def make_case(seed: int, world: Path) -> Case:
    """Make the case of a seed; damages files in the world, which must be a copy for this case."""
    source = random.Random(seed)
    case = Case(seed)
    weights, commands = zip(*COMMANDS, strict=True)
    case.line = source.choices(commands, weights)[0].split()
    verb, *arguments = case.line
    changes = source.choice((0, 0, 0, 1, 1, 2))
    for _ in range(changes):
        _change_argument(source, arguments)
    case.line = [verb, *arguments]
    files = _files_of(case.line, world)
    for _ in range(source.choice((1, 1, 2) if not changes else (0, 0, 1)) if files else 0):
        file = source.choice(files)
        if file.is_file():
            case.done.append(f"{file.relative_to(world)}: {_damage(source, file)}")
    if source.random() < 0.06 and (world / "model").is_dir():
        shutil.copy(world / "other" / "model.safetensors", world / "model" / "model.safetensors")
        case.done.append("another model in the place of model")
        case.foreign = True
    return case


def _change_argument(source: random.Random, arguments: list[str]) -> None:
    values = [at for at, word in enumerate(arguments) if not word.startswith("--")]
    kind = source.random()
    if values and kind < 0.55:
        arguments[source.choice(values)] = source.choice(ODD)
    elif kind < 0.9:
        arguments += [source.choice(OPTIONS), source.choice(ODD)]
    elif arguments:
        del arguments[source.randrange(len(arguments))]


def _files_of(line: list[str], world: Path) -> list[Path]:
    """List the files that the command may read, including those in directories; all are equally likely."""
    found: list[Path] = []
    for word in line[1:]:
        place = world / word
        if len(word) < 100 and word not in (".", "..", "") and not word.startswith("/") and place.exists():
            inside = sorted(path for path in place.rglob("*") if path.is_file()) if place.is_dir() else [place]
            found += inside
    return found


def _damage(source: random.Random, file: Path) -> str:
    general = (_truncate, _empty, _noise, _flip, _remove, _make_directory)
    special: dict[str, Callable[[random.Random, Path], str]] = {
        ".json": _change_json, ".safetensors": _change_tensors, ".jsonl": _change_lines, ".pt": _change_pickle,
    }  # fmt: skip
    chosen = special.get(file.suffix)
    if chosen is not None and source.random() < 0.65:
        with suppress(
            ValueError, IndexError, RuntimeError, SafetensorError, UnpicklingError, EOFError
        ):  # already damaged
            return chosen(source, file)
    return source.choice(general)(source, file)


def _truncate(source: random.Random, file: Path) -> str:
    content = file.read_bytes()
    left = source.randrange(len(content) + 1)
    file.write_bytes(content[:left])
    return f"cut to {left} bytes"


def _empty(source: random.Random, file: Path) -> str:
    file.write_bytes(b"")
    return "emptied"


def _noise(source: random.Random, file: Path) -> str:
    file.write_bytes(source.randbytes(source.choice((1, 100, 5_000))))
    return "noise"


def _flip(source: random.Random, file: Path) -> str:
    content = bytearray(file.read_bytes() or b"\0")
    for _ in range(source.choice((1, 5, 50))):
        content[source.randrange(len(content))] ^= 1 << source.randrange(8)
    file.write_bytes(content)
    return "bits flipped"


def _remove(source: random.Random, file: Path) -> str:
    file.unlink()
    return "removed"


def _make_directory(source: random.Random, file: Path) -> str:
    file.unlink()
    file.mkdir()
    return "a directory"


def _change_json(source: random.Random, file: Path) -> str:
    content = json.loads(file.read_text())
    said = _change_value(source, content)
    file.write_text(json.dumps(content))
    return said


def _change_value(source: random.Random, content: Any) -> str:
    """Change one value at any depth, in place."""
    path, here = [], content
    while True:
        keys = list(here) if isinstance(here, dict) else list(range(len(here)))
        if not keys:
            return "nothing"
        key = source.choice(keys)
        path.append(str(key))
        if not isinstance(here[key], (dict, list)) or not here[key] or source.random() < 0.2:
            break
        here = here[key]
    if isinstance(here, dict) and source.random() < 0.25:
        del here[key]
        return f"{'.'.join(path)} removed"
    if isinstance(here, dict) and source.random() < 0.1:
        here["more"] = source.choice(LEAVES)
        return f"a key beside {'.'.join(path)}"
    here[key] = source.choice(LEAVES)
    return f"{'.'.join(path)} is {here[key]!r}"


def _change_lines(source: random.Random, file: Path) -> str:
    lines = file.read_text().splitlines()
    at = source.randrange(len(lines))
    row = json.loads(lines[at])
    said = _change_value(source, row)
    lines[at] = json.dumps(row)
    file.write_text("\n".join(lines) + "\n")
    return f"line {at + 1}: {said}"


def _change_tensors(source: random.Random, file: Path) -> str:
    tensors = load_file(file)
    said = _change_tensor(source, tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, {"format": "pt"})
    return said


def _change_pickle(source: random.Random, file: Path) -> str:
    content = torch.load(file, weights_only=True)
    tensors = content.get("model", content)
    named = [name for name, value in tensors.items() if isinstance(value, torch.Tensor)]
    if named and source.random() < 0.7:
        said = _change_tensor(source, tensors, source.choice(named))
    else:
        said = _change_value(source, content)
    torch.save(content, file)
    return said


def _change_tensor(source: random.Random, tensors: dict[str, Any], name: str | None = None) -> str:
    name = name or source.choice(sorted(tensors))
    tensor = tensors[name]
    kind = source.choice(("removed", "not finite", "another shape", "another dtype", "renamed", "more", "scalar"))
    if kind in ("removed", "renamed"):
        del tensors[name]
    if kind in ("renamed", "more"):
        tensors[f"{name}.more"] = torch.zeros(2)
    if kind == "not finite":
        tensors[name] = torch.full(tensor.shape, source.choice((float("nan"), float("inf"))))
    if kind == "another shape":
        tensors[name] = tensor[: len(tensor) // 2] if tensor.ndim else tensor
    if kind == "another dtype":
        tensors[name] = tensor.to(source.choice((torch.int64, torch.float64, torch.bool, torch.bfloat16)))
    if kind == "scalar":
        tensors[name] = torch.tensor(7)
    return f"{name} {kind}"


@dataclass(frozen=True)
class End:
    """How a command ended."""

    code: object
    out: str
    errors: str


def run_case(case: Case, world: Path) -> End:
    """Run the command in this process, in the world's folder."""
    out, errors = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    before, here, environment = sys.argv, Path.cwd(), dict(os.environ)
    code: object = 0
    try:
        os.chdir(world)
        sys.argv = ["gossamer", *case.line]
        with redirect_stdout(out), redirect_stderr(errors), _alarm():
            try:
                main()
            except SystemExit as stopped:
                code = stopped.code
            except Exception as error:  # would print a traceback
                code = f"Traceback: {type(error).__name__}: {error}"
    finally:
        sys.argv = before
        os.chdir(here)
        os.environ.clear()
        os.environ.update(environment)
    said = (stream.buffer.getvalue().decode("utf-8", "replace") for stream in (out, errors))
    return End(code, *said)


class Hangs(BaseException):
    """A case took too long."""


@contextmanager
def _alarm() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Hangs

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def snapshot(world: Path) -> dict[str, bytes]:
    """Read all files in the world."""
    return {str(path.relative_to(world)): path.read_bytes() for path in sorted(world.rglob("*")) if path.is_file()}


USES_DENSE = ("evaluate run", "report run --tokens", "view run", "circuits run", "compare run ", "merge adapter")


def faults(case: Case, end: End, before: dict[str, bytes], world: Path) -> list[str]:
    """List the faults in how a case ended."""
    found = []
    after = snapshot(world)
    if end.code not in (0, 2):
        found.append(f"ended with {end.code}")
    if "Traceback" in end.out + end.errors:
        found.append("a traceback was printed")
    left = [name for name in after if ".partial" in name or name.endswith(".gossamer-lock")]
    if left:
        found.append(f"left behind: {left[0]}")
    if end.code == 2:
        lines = [line for line in end.errors.splitlines() if line.startswith("gossamer: ")]
        if len(lines) != 1 or end.errors.splitlines()[-1] != lines[0]:
            found.append(f"not one line at the end: {end.errors[-500:]!r}")
        if "begun" not in case.line:
            changed = [name for name in {*before, *after} if before.get(name) != after.get(name)]
            found += [f"refused, but {name} changed" for name in changed[:1]]
    line = " ".join(case.line)
    if end.code == 0 and case.foreign and line.startswith(USES_DENSE):
        found.append("figures of a model that the run was not begun with")
    return found
