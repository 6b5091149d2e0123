"""Errors in files are reported in one line: the file, what is wrong, and what to do."""

import json
import os
import pickle
import random
from pathlib import Path
from typing import Any, Literal, TypedDict

import pytest
import torch
from safetensors.torch import save_file
from typing_extensions import NotRequired

from gossamer.errors import GossamerError
from gossamer.inputs import check, read_json, read_json_lines, read_pickle, read_tensors, read_text


class Inner(TypedDict):
    size: int
    share: NotRequired[float | None]


class Outer(TypedDict):
    name: Literal["a", "b"]
    parts: list[Inner]
    by_name: dict[str, Inner | str]


GOOD: dict[str, Any] = {
    "name": "a",
    "parts": [{"size": 1, "share": 2}],
    "by_name": {"x": "y", "z": {"size": 2}},
    "more": 1,
}


def refusal(read: Any, *arguments: Any, **options: Any) -> str:
    with pytest.raises(GossamerError) as told:
        read(*arguments, **options)
    assert "\n" not in str(told.value)
    return str(told.value)


def test_a_record_is_as_it_is_described(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode())
    assert read_json(tmp_path / "a.json", Outer) == GOOD


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": "c"}, "name is 'c', not 'a' or 'b'"),
        ({"parts": {}}, "parts is an object, not a list"),
        ({"parts": [{}]}, "it lacks parts[0].size"),
        ({"parts": [{"size": True}]}, "parts[0].size is True, not a whole number"),
        ({"parts": [{"size": 1, "share": "x" * 99}]}, "parts[0].share is 'xxxxx"),
        ({"by_name": {"x": 3}}, "by_name.x is 3, not"),
        ({"by_name": None}, "by_name is None, not an object"),
    ],
)
def test_what_is_not_as_described_is_named_with_its_place(change: dict, said: str, tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps({**GOOD, **change}))
    line = refusal(read_json, file, Outer, remedy="measure it anew")
    assert line.startswith(f"{file} cannot be used: {said}")
    assert line.endswith("; measure it anew")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not valid JSON"),
        (b'{"a": ', "not valid JSON"),
        (b"\xff\xfe{", "not UTF-8 text"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": NaN}', "NaN is no number"),
        (b'{"a": -Infinity}', "-Infinity is no number"),
        (b"[1]", "it is a list, not an object"),
        (b'{"a": ' + b"1" * 5_000 + b"}", "digits"),
    ],
)
def test_what_is_no_record_is_named(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(content)
    assert said in refusal(read_json, tmp_path / "a.json")


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    for read in (read_json, read_text, read_tensors, read_pickle, read_json_lines):
        assert "No such file" in refusal(read, tmp_path / "none")
        assert str(tmp_path) in refusal(read, tmp_path)


def test_lines_are_counted_and_one_that_a_kill_cut_off_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"size": 1}\n\n{"size": 2, "text": "\u2028"}\n{"si')
    assert [row["size"] for row in read_json_lines(file, Inner, cut_off=True)] == [1, 2]
    assert refusal(read_json_lines, file, Inner).startswith(f"{file}, line 4 cannot be used: not valid JSON")


def test_weights_that_are_not_as_they_should_be_are_named(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(2, 3), "b": torch.ones(2, dtype=torch.int32)}, file)
    assert set(read_tensors(file, {"a": (None, 3), "b": (2,)})) == {"a", "b"}
    assert "it lacks c" in refusal(read_tensors, file, {"c": (1,)})
    assert "a has shape [2, 3], not [any, 4]" in refusal(read_tensors, file, {"a": (None, 4)})
    assert "b has no place in it" in refusal(read_tensors, file, {"a": (2, 3)})
    save_file({"a": torch.tensor([1.0, float("nan")])}, file)
    assert "a has values that are not finite" in refusal(read_tensors, file)
    file.write_bytes(file.read_bytes()[:-3])
    assert "cut short" in refusal(read_tensors, file)


class Harm:
    def __reduce__(self):
        return os.mkdir, ("harmed",)


def test_pickles_are_told_apart_and_nothing_in_them_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "a.pt"
    torch.save({"a": torch.zeros(300)}, file)
    whole = file.read_bytes()
    assert read_pickle(file)["a"].shape == (300,)
    torch.save({"a": Harm()}, file)
    assert "more than tensors and plain values: posix.mkdir, which is code" in refusal(read_pickle, file)
    for protocol in (0, 2, 4):
        file.write_bytes(pickle.dumps({"a": Harm()}, protocol=protocol))
        assert "posix.mkdir, which is code, and is not run" in refusal(read_pickle, file)
    noise = random.Random(0).randbytes(500)
    for content, said in ((whole[:400], "damaged or cut short"), (b"hello", "no file that torch.save wrote"),
                          (noise, "no file that torch.save wrote"), (b"", "no file that")):  # fmt: skip
        file.write_bytes(content)
        assert said in refusal(read_pickle, file)
    assert not (tmp_path / "harmed").exists()


def test_numbers_take_no_truth_values_and_no_infinities() -> None:
    check(1, float)
    for value in (True, float("inf"), float("nan"), "1", None):
        with pytest.raises(ValueError, match="not a number"):
            check(value, float)
