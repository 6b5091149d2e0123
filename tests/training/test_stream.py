"""Texts streamed during training: held-out text, the parts of processes and workers, and resuming in the middle."""

import copy
import gzip
import json
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch

from conftest import sentences
from families import tiny_model
from gossamer.errors import GossamerError
from gossamer.training import tokens
from gossamer.training.data import BlockCounts, is_held_out, pack
from gossamer.training.stream import ONE_IN, BlockStream, open_stream, unseen_blocks

LENGTH = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """600 documents, all different, in four files of unequal length."""
    folder = tmp_path_factory.mktemp("stream")
    documents = [f"{text} {number}" for number, text in enumerate(sentences(600))]
    for name, part in zip("abcd", (slice(0, 100), slice(100, 350), slice(350, 420), slice(420, 600)), strict=True):
        with gzip.open(folder / f"{name}.jsonl.gz", "wt", encoding="utf-8") as stream:
            stream.writelines(json.dumps({"text": text}) + "\n" for text in documents[part])
    return folder


def documents_of(text: Path | str) -> list[str]:
    return [row["text"] for row in open_stream(str(text))]


def take(stream: BlockStream, batches: int, size: int = 2) -> list[list[tuple[int, ...]]]:
    """Take the next batches and mark each as trained on."""
    taken = []
    for batch in islice(stream.loader(size), batches):
        assert "fault" not in batch, batch
        stream.passed(batch["place"])
        taken.append([tuple(row) for row in batch["input_ids"].tolist()])
    return taken


def test_blocks_of_one_reader_are_the_packed_text(folder: Path, tokenizer) -> None:
    documents = [text for text in documents_of(folder) if not is_held_out(text)]
    packed = [tuple(row) for row in pack(documents, tokenizer, LENGTH, name="text").tolist()]
    batches = take(BlockStream(str(folder), tokenizer, LENGTH), len(packed), size=1)
    assert [batch[0] for batch in batches] == packed


def test_unseen_blocks_share_no_document_with_training(folder: Path, tokenizer) -> None:
    documents = documents_of(folder)
    unseen = [text for text in documents if is_held_out(text)]
    assert len(documents) == 600
    assert 0.5 * 600 / ONE_IN < len(unseen) < 2 * 600 / ONE_IN
    counts = BlockCounts(LENGTH, validation=4, held_out=6)
    blocks = unseen_blocks(str(folder), tokenizer, counts)
    assert [tuple(part.shape) for part in vars(blocks).values()] == [(0, LENGTH), (4, LENGTH), (6, LENGTH)]
    packed = pack(unseen, tokenizer, LENGTH, name="text")
    assert torch.equal(torch.cat([blocks.validation, blocks.held_out]), packed[:10])


def part_documents(stream: BlockStream, slot: int) -> list[str]:
    from datasets.distributed import split_dataset_by_node

    parts = split_dataset_by_node(
        open_stream(stream.text), stream.process * stream.slots + slot, stream.processes * stream.slots
    )
    return [row["text"] for row in parts]


@pytest.mark.parametrize("processes,workers", [(1, 2), (2, 2), (3, 1), (2, 5)])
def test_the_parts_hold_every_document_once(folder: Path, tokenizer, processes: int, workers: int) -> None:
    found: Counter[str] = Counter()
    for process in range(processes):
        stream = BlockStream(str(folder), tokenizer, LENGTH, process=process, processes=processes, workers=workers)
        for slot in range(stream.slots):
            found.update(part_documents(stream, slot))
    assert found == Counter(documents_of(folder))


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("stop", [1, 7, 20])
def test_going_on_repeats_and_skips_nothing(folder: Path, tokenizer, workers: int, stop: int) -> None:
    """Text that was read ahead at the stop does not matter. The state goes through JSON, as in a checkpoint."""
    whole = take(BlockStream(str(folder), tokenizer, LENGTH, workers=workers), stop + 25)
    begun = BlockStream(str(folder), tokenizer, LENGTH, workers=workers)
    first = take(begun, stop)
    again = BlockStream(str(folder), tokenizer, LENGTH, workers=workers)
    again.load_state_dict(json.loads(json.dumps(begun.state_dict())))
    assert first + take(again, 25) == whole


def test_at_its_end_the_text_begins_again(tmp_path: Path, tokenizer) -> None:
    documents = [text for text in sentences(60) if not is_held_out(text)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    packed = pack(documents, tokenizer, LENGTH, name="text")
    stream = BlockStream(str(tmp_path), tokenizer, LENGTH)
    batches = take(stream, 2 * len(packed) + 1, size=1)
    assert stream.rounds == 2
    assert batches[: len(packed)] == batches[len(packed) : 2 * len(packed)]
    again = BlockStream(str(tmp_path), tokenizer, LENGTH)
    again.load_state_dict(stream.state_dict())
    assert take(again, 3, size=1) == batches[1:4]


def test_going_on_at_the_end_of_an_only_document_begins_again(tmp_path: Path, tokenizer) -> None:
    ids = pack(sentences(20), tokenizer, 1, name="text").flatten().tolist()
    text = tokenizer.decode(ids[: 6 * LENGTH + 4])
    (tmp_path / "a.txt").write_text(text)
    assert not is_held_out(text)
    blocks = (len(tokenizer(text, add_special_tokens=False).input_ids) + 1) // LENGTH
    stream = BlockStream(str(tmp_path), tokenizer, LENGTH)
    first = take(stream, blocks, size=1)
    again = BlockStream(str(tmp_path), tokenizer, LENGTH)
    again.load_state_dict(stream.state_dict())
    assert take(again, blocks, size=1) == first


def test_after_the_last_batch_of_a_training_nothing_comes(folder: Path, tokenizer) -> None:
    stream = BlockStream(str(folder), tokenizer, LENGTH, most=3)
    take(stream, 3)
    again = BlockStream(str(folder), tokenizer, LENGTH, most=3)
    again.load_state_dict(stream.state_dict())
    assert list(again) == []
    assert len(take(again, 1)) == 0


def test_long_documents_are_cut_into_many_blocks(tmp_path: Path, tokenizer) -> None:
    (tmp_path / "a.txt").write_text("\n".join(sentences(200)))
    assert not is_held_out((tmp_path / "a.txt").read_text())
    stream = BlockStream(str(tmp_path), tokenizer, LENGTH)
    first = take(stream, 9, size=1)
    again = BlockStream(str(tmp_path), tokenizer, LENGTH)
    again.load_state_dict(stream.state_dict())
    packed = pack([(tmp_path / "a.txt").read_text()], tokenizer, LENGTH, name="text").tolist()
    assert [list(batch[0]) for batch in first + take(again, 9, size=1)] == packed[:18]


def test_blank_documents_are_in_no_part(tmp_path: Path, tokenizer) -> None:
    documents = sentences(400)
    for name, rows in (("a", documents), ("b", [row for text in documents for row in (text, "", " \n")])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    counts = BlockCounts(LENGTH, validation=2, held_out=9)
    without, among = (unseen_blocks(str(tmp_path / name), tokenizer, counts) for name in "ab")
    assert len(without.held_out) == 9
    assert torch.equal(without.held_out, among.held_out)
    assert torch.equal(without.validation, among.validation)
    streams = [BlockStream(str(tmp_path / name), tokenizer, LENGTH) for name in "ab"]
    first, second = (take(stream, 20) for stream in streams)
    assert first == second
    again = BlockStream(str(tmp_path / "b"), tokenizer, LENGTH)
    again.load_state_dict(streams[1].state_dict())
    assert take(again, 5) == take(streams[0], 5)


def test_going_on_within_a_document_in_pieces(tmp_path: Path, tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["\n".join(sentences(120, seed)) for seed in range(3)]
    packed = pack([text for text in texts if not is_held_out(text)], tokenizer, LENGTH, name="text").tolist()
    assert len(packed) > 150
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    monkeypatch.setattr(tokens, "PIECE", 1_024)
    monkeypatch.setattr(tokens, "OVERLAP", 256)
    stream, found = BlockStream(str(tmp_path), tokenizer, LENGTH), []
    for stop in (1, 30, 31, 95, 110, len(packed)):
        found += [list(batch[0]) for batch in take(stream, stop - len(found), size=1)]
        state = json.loads(json.dumps(stream.state_dict()))
        stream = BlockStream(str(tmp_path), tokenizer, LENGTH)
        stream.load_state_dict(state)
    assert found == packed


@pytest.mark.parametrize("held_out", [False, True])
def test_a_text_of_one_document_is_refused_before_training(held_out: bool, tmp_path: Path, tokenizer) -> None:
    text = next(text for seed in range(99) if is_held_out(text := "\n".join(sentences(60, seed))) == held_out)
    (tmp_path / "a.txt").write_text(text)
    counts = BlockCounts(LENGTH, validation=2, held_out=4)
    with pytest.raises(GossamerError, match=r"a\.txt is 1 document, too few to .*; leave --stream out, or give"):
        unseen_blocks(str(tmp_path / "a.txt"), tokenizer, counts)
    (tmp_path / "b.txt").write_text(" \n")
    with pytest.raises(GossamerError, match=r"b\.txt is empty"):
        unseen_blocks(str(tmp_path / "b.txt"), tokenizer, counts)


def test_a_stream_needs_a_model_that_knows_every_token(folder: Path, tokenizer) -> None:
    larger = copy.deepcopy(tokenizer)
    larger.add_tokens([f"<a{number}>" for number in range(20)])
    counts, model = BlockCounts(LENGTH, validation=2, held_out=4), tiny_model("llama")
    unseen_blocks(str(folder), tokenizer, counts, model=model)
    with pytest.raises(GossamerError, match=r"tokenizer has 98 tokens .*, the model embeddings for 97 only"):
        unseen_blocks(str(folder), larger, counts, model=model)


@pytest.mark.parametrize("workers", [0, 2])
def test_faults_in_the_middle_are_said_in_one_line(tmp_path: Path, tokenizer, workers: int) -> None:
    lines = [json.dumps({"text": text}) for text in sentences(200)]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines[:150], "{broken", *lines[150:]]))
    stream = BlockStream(str(tmp_path), tokenizer, LENGTH, workers=workers)
    *good, last = list(islice(stream.loader(2), 200))
    assert len(good) > 20
    assert "a.jsonl, line 151: not valid JSON" in last["fault"]
    assert "\n" not in last["fault"]


def test_too_little_text_is_said(tmp_path: Path, tokenizer) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "the cat"}))
    (batch,) = BlockStream(str(tmp_path), tokenizer, LENGTH, processes=2, process=1).loader(2)
    assert "fewer than 16 tokens to train on for part 2 of 2" in batch["fault"]


def test_text_sampled_from_the_model_is_no_stream() -> None:
    with pytest.raises(GossamerError, match="--stream needs a text that exists"):
        open_stream("self")
