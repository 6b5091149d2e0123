"""Reading and checking files: every error is one line that names the file, the fault and the remedy.

Records are JSON or JSON lines and are checked against a type, a ``TypedDict``, or a list or dict of these. Weights are
safetensors files, or files written by ``torch.save``, which are read without running any code in them. Tensors are
checked for their names, their shapes and values that are not finite.
"""

import json
import math
import pickletools
import types
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints, is_typeddict

from safetensors import SafetensorError

from gossamer.errors import GossamerError

_T = TypeVar("_T")

Shape = tuple[int | None, ...]
"""Shape of a tensor; None allows any size."""


@contextmanager
def reading(what: object, remedy: str = "") -> Iterator[None]:
    """Turn any error while something is read into a GossamerError that blames what was read.

    Other libraries raise dozens of exception types, so all are caught. Put nothing into the block that does not depend
    on what is read.

    Args:
        what: the file, or the user's name for what is read.
        remedy: what the user can do about it.
    """
    try:
        yield
    except (GossamerError, MemoryError):
        raise
    except Exception as error:
        cannot = "read" if isinstance(error, OSError) else "used"
        end = f"; {remedy}" if remedy else ""
        raise GossamerError(f"{what} cannot be {cannot}: {reason(error)}{end}") from error


def reason(error: BaseException) -> str:
    """The reason for an error, in one line for a reader who does not know where it was raised."""
    said = " ".join(str(error).split())
    if isinstance(error, OSError):
        return error.strerror or said or type(error).__name__
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON ({said})"
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 text ({said})"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, KeyError):
        return f"it lacks {said}"
    if isinstance(error, SafetensorError):
        return f"cut short, or no safetensors file ({said})"
    if isinstance(error, (TypeError, AttributeError, IndexError)):
        return f"a value of another kind than it should be ({said})"
    return said or type(error).__name__


def read_text(file: Path, remedy: str = "") -> str:
    """Read a UTF-8 text file, without the byte-order mark that some editors write.

    Raises:
        GossamerError: if it cannot be read.
    """
    with reading(file, remedy):
        return file.read_text(encoding="utf-8-sig")


def read_json(file: Path, kind: type[_T] | Any = dict, *, remedy: str = "", nan: bool = False) -> _T:
    """Read a JSON file.

    Args:
        file: the file.
        kind: the expected type: see :func:`check`.
        remedy: what the user can do if the file is invalid.
        nan: whether to parse NaN and Infinity, which JSON does not have.

    Raises:
        GossamerError: naming the file and what is wrong with it.
    """
    return parse_json(read_text(file, remedy), kind, place=file, remedy=remedy, nan=nan)


def parse_json(text: str, kind: type[_T] | Any = dict, *, place: object, remedy: str = "", nan: bool = False) -> _T:
    """Parse a JSON text: see :func:`read_json`."""
    with reading(place, remedy):
        found = json.loads(text, parse_constant=float if nan else _no_number)
        check(found, kind)
    return cast(_T, found)


def read_json_lines(file: Path, kind: type[_T] | Any = dict, *, remedy: str = "", cut_off: bool = False) -> list[_T]:
    """Read a file of JSON lines, skipping blank ones.

    Args:
        file: the file.
        kind: the expected type of each line: see :func:`check`.
        remedy: what the user can do if a line is invalid.
        cut_off: skip a last line without a newline, which a killed process left incomplete.

    Raises:
        GossamerError: naming the file, the line and what is wrong with it.
    """
    # Not splitlines(), which also splits at U+2028, U+0085 and others: these do not end a JSON line.
    lines = read_text(file, remedy).split("\n")
    if cut_off:
        lines = lines[:-1]
    return [
        parse_json(line, kind, place=f"{file}, line {number}", remedy=remedy)
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number that JSON has")


def check(value: Any, kind: Any, place: str = "") -> None:
    """Check that a value has the described type.

    Args:
        value: the value that was read.
        kind: a type, ``list[...]``, ``dict[str, ...]``, a union, Literal or TypedDict. ``float`` also accepts whole
            numbers, ``Any`` accepts everything, and a TypedDict accepts additional keys.
        place: path of the value in the file.

    Raises:
        ValueError: naming the place, the value found and the type expected.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return
    if origin in (Union, types.UnionType):
        _check_union(value, arguments, kind, place)
    elif origin is Literal:
        if value not in arguments:
            raise _wrong(value, " or ".join(map(repr, arguments)), place)
    elif is_typeddict(kind):
        _check_dict(value, kind, place)
    elif origin is list:
        if not isinstance(value, list):
            raise _wrong(value, "a list", place)
        for index, one in enumerate(value):
            check(one, arguments[0], f"{place}[{index}]")
    elif origin is dict:
        if not isinstance(value, dict):
            raise _wrong(value, "an object", place)
        for key, one in value.items():
            check(one, arguments[1], f"{place}.{key}" if place else key)
    elif kind is float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise _wrong(value, "a number", place)
    elif not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise _wrong(value, _NAMES.get(kind, kind.__name__), place)


_NAMES: Mapping[Any, str] = {
    int: "a whole number", str: "a text", bool: "true or false", dict: "an object", list: "a list",
    type(None): "null", float: "a number",
}  # fmt: skip


def _check_union(value: Any, kinds: Sequence[Any], kind: Any, place: str) -> None:
    if value is None and type(None) in kinds:
        return
    others = [one for one in kinds if one is not type(None)]
    if len(others) == 1:
        check(value, others[0], place)
        return
    for one in others:
        try:
            check(value, one, place)
        except ValueError:
            continue
        return
    raise _wrong(value, str(kind), place)


def _check_dict(value: Any, kind: Any, place: str) -> None:
    if not isinstance(value, dict):
        raise _wrong(value, "an object", place)
    for key, one in get_type_hints(kind).items():
        at = f"{place}.{key}" if place else key
        if key in value:
            check(value[key], one, at)
        elif key in kind.__required_keys__:
            raise ValueError(f"it lacks {at}")


def _wrong(value: Any, wanted: str, place: str) -> ValueError:
    shown = repr(value) if isinstance(value, (str, int, float, bool, type(None))) else _NAMES[type(value)]
    shown = f"{shown[:60]}..." if len(shown) > 60 else shown
    return ValueError(f"{place or 'it'} is {shown}, not {wanted}")


def read_tensors(file: Path, shapes: Mapping[str, Shape] | None = None, *, remedy: str = "") -> "dict[str, Tensor]":  # type: ignore[name-defined]
    """Read the tensors of a safetensors file.

    Args:
        file: the file.
        shapes: of exactly the tensors that the file must have; None accepts any tensors.
        remedy: what the user can do if the file is damaged.

    Raises:
        GossamerError: naming the file, the tensor and what is wrong with it.
    """
    from safetensors.torch import load_file

    with reading(file, remedy):
        tensors = load_file(file)
        check_tensors(tensors, shapes)
    return tensors


def check_tensors(
    tensors: "Mapping[str, Tensor]",  # type: ignore[name-defined]
    shapes: Mapping[str, Shape] | None = None,
) -> None:
    """Check that no tensor is missing, unexpected, of another shape, or has values that are not finite.

    Raises:
        ValueError: naming the tensor.
    """
    for name, shape in (shapes or {}).items():
        if name not in tensors:
            raise ValueError(f"it lacks {name}")
        found = tuple(tensors[name].shape)
        if len(found) != len(shape) or any(b is not None and a != b for a, b in zip(found, shape, strict=True)):
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            raise ValueError(f"{name} has shape {list(found)}, not [{wanted}]")
    if shapes is not None and (more := sorted(set(tensors) - set(shapes))):
        raise ValueError(f"{more[0]} has no place in it")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{name} has values that are not finite")


def read_pickle(file: Path, *, remedy: str = "") -> Any:
    """Read the tensors and plain values of a file written by ``torch.save``. No code in the file is run.

    Raises:
        GossamerError: naming the file and whether it is damaged, something else, or holds code.
    """
    import torch

    with reading(file, remedy):
        if not file.is_file():
            file.read_bytes()  # raises the reason why it cannot be read
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return torch.load(file, map_location="cpu", weights_only=True)
        except MemoryError:
            raise
        except Exception as error:  # of many types, none of which says what is wrong with the file
            raise ValueError(_why_not_loaded(file)) from error


_PLAIN_MODULES = ("torch", "collections", "numpy", "_codecs")


def _why_not_loaded(file: Path) -> str:
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as parts:
                name = next(name for name in parts.namelist() if name.endswith("data.pkl"))
                named = list(_names_in(parts.read(name)))
        else:
            named = list(_names_in(file.read_bytes()))
    except (zipfile.BadZipFile, StopIteration, ValueError, zlib.error, EOFError, NotImplementedError):
        with file.open("rb") as stream:
            begun = stream.read(2) == b"PK"
        return "it is damaged or cut short" if begun else "it is no file that torch.save wrote, or it is damaged"
    foreign = [name for name in named if name.split(".")[0] not in _PLAIN_MODULES]
    if foreign:
        return f"it holds more than tensors and plain values: {foreign[0]}, which is code, and is not run"
    return "it is damaged, or of a kind that torch.load(weights_only=True) does not read"


def _names_in(pickled: bytes) -> Iterator[str]:
    """The names that a pickle imports, found without importing them."""
    texts: list[str] = []
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name in ("GLOBAL", "INST"):
            yield ".".join(str(argument).split(" "))
        elif opcode.name == "STACK_GLOBAL":
            yield ".".join(texts[-2:])
        elif isinstance(argument, str):
            texts.append(argument)
