"""Files and folders of text: all kinds of files, files without text, links, and messages for faults."""

import bz2
import gzip
import json
import lzma
import os
from pathlib import Path

import pyarrow
import pytest

from conftest import sentences
from gossamer import GossamerError
from gossamer.training.documents import file_kind, read_documents, skipped_files, text_files

DOCUMENTS = sentences(3)
ROWS = [{"text": text} for text in DOCUMENTS]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)

PACKED = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pyarrow.compress(data, codec="zstd", asbytes=True),
}


@pytest.mark.parametrize("ending", PACKED)
@pytest.mark.parametrize(
    "kind,content",
    [
        (".jsonl", LINES),
        (".json", LINES),
        (".json", "\n" + json.dumps(ROWS)),
        (".json", json.dumps(ROWS, indent=2)),
        (".JSON", json.dumps(ROWS, indent="\t").replace("\n", "\r\n")),
        (".Jsonl", LINES),
    ],
)
def test_every_kind_of_file_holds_the_same_documents(kind: str, content: str, ending: str, tmp_path: Path) -> None:
    file = tmp_path / f"a{kind}{ending}"
    file.write_bytes(PACKED[ending](content.encode("utf-8-sig")))
    assert list(read_documents(file)) == DOCUMENTS
    assert list(read_documents(tmp_path)) == DOCUMENTS


@pytest.mark.parametrize("content", ['{"text": "one"}', '{\n  "text":\n  "one"\n}\n'])
def test_a_json_file_may_hold_one_document(content: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(content)
    assert list(read_documents(tmp_path / "a.json")) == ["one"]


@pytest.mark.parametrize("ending", PACKED)
def test_a_plain_file_is_one_document(ending: str, tmp_path: Path) -> None:
    (tmp_path / f"a.TXT{ending}").write_bytes(PACKED[ending]("one\ntwo é".encode()))
    assert list(read_documents(tmp_path)) == ["one\ntwo é"]


@pytest.mark.parametrize(
    "name,kind",
    [
        ("a.txt", (".txt", "")),
        ("a.txt.JSONL.Gz", (".jsonl", ".gz")),
        ("a.gz", None),
        ("a.csv.gz", None),
        ("txt", None),
        ("a.txt~", None),
        ("a.zst.txt", (".txt", "")),
    ],
)
def test_the_end_of_a_name_says_what_a_file_is(name: str, kind: tuple[str, str] | None) -> None:
    assert file_kind(name) == kind


@pytest.mark.parametrize("ending", [ending for ending in PACKED if ending])
@pytest.mark.parametrize("harm", [lambda data: data[:-12], lambda data: b"one two three", lambda data: data[:9]])
def test_a_damaged_file_is_named(harm, ending: str, tmp_path: Path) -> None:
    file = tmp_path / f"a.jsonl{ending}"
    file.write_bytes(harm(PACKED[ending](("".join(sentences(200))).encode())))
    with pytest.raises(GossamerError, match=r"a\.jsonl.* is not a whole (gzip|bzip2|xz|zstd) file") as caught:
        list(read_documents(file))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content,message",
    [
        ('{"text": "one"}\n{"text": 3}\n', "line 2: no string under the key 'text'"),
        ('[{"text": "one"},\n {"body": "two"}]', "object 2: no string under the key 'text'"),
        ('[\n{"text": "one"},\n]', "not valid JSON"),
        ('{"text": "one"}\n[1]\n', "line 2: no string under the key 'text'"),
        ("[" * 100_000, "not valid JSON"),
        ('["\\ud83d"]', "object 1: no string"),
        ('[{"text": "\\ud83d"}]', "object 1: the text holds half a character"),
    ],
)
def test_faults_of_a_json_file_are_named(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(GossamerError, match=message) as caught:
        list(read_documents(tmp_path / "a.json"))
    assert "a.json" in str(caught.value)


def test_hidden_files_and_folders_are_no_text(tmp_path: Path) -> None:
    """Such as copies that notebooks keep, and binary files that macOS creates with the name of another file."""
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "._a.txt").write_bytes(b"\x00\x05\x16\x07\x00\xff")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / ".ipynb_checkpoints" / "a-checkpoint.txt").write_text("older one")
    assert list(read_documents(tmp_path)) == ["one"]
    assert skipped_files(str(tmp_path)) == f"{tmp_path}; passed over: ._a.txt, .ipynb_checkpoints (hidden)"
    assert list(read_documents(tmp_path / ".ipynb_checkpoints")) == ["older one"]


def test_what_is_passed_over_is_said_in_one_line(tmp_path: Path) -> None:
    for name in ("a.txt", "b.csv", "c.csv", "d.csv", "e.csv", "f.parquet"):
        (tmp_path / name).write_text("one")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "g.json").write_text('[{"text": "two"}]')
    os.mkfifo(tmp_path / "pipe.txt")
    assert list(read_documents(tmp_path)) == ["one", "two"]
    assert skipped_files(str(tmp_path)) == (
        f"{tmp_path}; passed over: b.csv, c.csv, d.csv and 2 more (of another kind); config.json (without documents); "
        "pipe.txt (no file)"
    )
    (tmp_path / "h").mkdir()
    (tmp_path / "h" / "a.txt").write_text("three")
    assert skipped_files(str(tmp_path / "h")) is None
    assert skipped_files(str(tmp_path / "a.txt")) is None
    (tmp_path / "h" / "a.txt").rename(tmp_path / "h" / "a.text")
    with pytest.raises(GossamerError, match=r"holds no text: .*passed over: a\.text \(of another kind\)"):
        text_files(tmp_path / "h")


def test_links_are_followed_once(tmp_path: Path) -> None:
    text, elsewhere = tmp_path / "text", tmp_path / "elsewhere"
    for folder in (text / "own", elsewhere / "deep"):
        folder.mkdir(parents=True)
    (text / "own" / "a.txt").write_text("one")
    (elsewhere / "b.txt").write_text("two")
    (elsewhere / "deep" / "c.txt").write_text("three")
    (elsewhere / "deep" / "up").symlink_to(elsewhere)
    (tmp_path / "outside.txt").write_text("four")
    (text / "0").symlink_to(text / "own" / "a.txt")
    (text / "0.txt").symlink_to(text / "own" / "a.txt")
    (text / "1").symlink_to(elsewhere / "deep")
    (text / "2").symlink_to(elsewhere)
    (text / "3").symlink_to(text)
    (text / "4").symlink_to(tmp_path)
    (text / "5").symlink_to(text / "own")
    os.link(text / "own" / "a.txt", text / "own" / "z.txt")
    assert [str(file.relative_to(text)) for file in text_files(text)] == ["1/c.txt", "2/b.txt", "own/a.txt"]
    assert skipped_files(str(text)) == (
        f"{text}; passed over: 0.txt, 2/deep, 5 and 1 more (found already); 0 (of another kind); "
        "1/up, 3, 4 (leads back to where it lies)"
    )
    (tmp_path / "link").symlink_to(text)
    assert list(read_documents(tmp_path / "link")) == ["three", "two", "one"]


@pytest.mark.skipif(os.getuid() == 0, reason="root reads everything")
def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "locked").mkdir(mode=0)
    with pytest.raises(GossamerError, match="locked cannot be read: Permission denied"):
        text_files(tmp_path)
    (tmp_path / "locked").chmod(0o755)
