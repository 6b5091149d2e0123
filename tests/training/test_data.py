"""From text to blocks: all kinds of files, the split, the choice of blocks, and messages for faults."""

import copy
import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, normalizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from conftest import sentences
from families import tiny_model
from gossamer import GossamerError
from gossamer.training.data import BlockCounts, is_held_out, load_blocks, pack, sample_blocks, split, split_by_checksum
from gossamer.training.data_sets import DataSet, at_commit, data_set_commit
from gossamer.training.documents import read_documents

COUNTS = BlockCounts(seq_len=16, train=4, validation=3, held_out=2)
SMALL = {"counts": COUNTS, "seed": 0}


def test_split_holds_out_the_last_twentieth_of_the_characters() -> None:
    documents = [letter * 30 for letter in "abcdefghij"]
    train, held_out = split(documents)
    assert "".join(train + held_out) == "".join(documents)
    assert sum(map(len, held_out)) == 15
    assert held_out == ["j" * 15]


def test_pack_joins_documents_with_the_end_token_and_drops_the_tail(tokenizer) -> None:
    documents = sentences(5)
    stream = [t for d in documents for t in [*tokenizer(d)["input_ids"], tokenizer.eos_token_id]]
    blocks = pack(documents, tokenizer, 7, name="text")
    assert blocks.shape == (len(stream) // 7, 7)
    assert blocks.flatten().tolist() == stream[: len(stream) // 7 * 7]


def test_pack_reads_no_more_documents_than_it_needs(tokenizer) -> None:
    documents = sentences(1000)
    unread = iter(documents)
    blocks = pack(unread, tokenizer, 7, name="text", most=3)
    assert torch.equal(blocks, pack(documents, tokenizer, 7, name="text")[:3])
    assert len(list(unread)) > 900


@pytest.mark.parametrize(
    "special,end",
    [
        ({"bos_token": "<s>", "eos_token": "</s>"}, "</s>"),
        ({"bos_token": "<s>", "sep_token": "<pad>"}, "<s>"),
        ({"sep_token": "<pad>"}, "<pad>"),
        ({}, ""),
    ],
)
def test_documents_are_joined_by_what_the_tokenizer_has(special: dict[str, str], end: str, tokenizer) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, **special)
    expected = [t for text in ("one", "two") for t in [*bare(text)["input_ids"], *bare(end)["input_ids"]]]
    assert pack(["one", "two"], bare, 1, name="text").flatten().tolist() == expected


def test_all_kinds_of_files_hold_the_same_documents(tmp_path: Path) -> None:
    documents = sentences(3)
    rows = "".join(json.dumps({"text": d}) + "\n" for d in documents)
    (tmp_path / "a.jsonl").write_text(rows + "\n")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    assert list(read_documents(tmp_path / "a.jsonl")) == documents
    assert list(read_documents(tmp_path / "b.jsonl.gz")) == documents
    (tmp_path / "c.txt").write_text("one\ntwo")
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress(b"drei"))
    assert list(read_documents(tmp_path)) == [*documents, *documents, "one\ntwo", "drei"]


def test_only_the_end_of_a_name_says_what_is_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt.jsonl").write_text('{"text": "one"}\n')
    (tmp_path / "b.txt").mkdir()
    (tmp_path / "b.txt" / "c.txt").write_text("two")
    assert list(read_documents(tmp_path)) == ["one", "two"]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n', encoding="utf-8-sig")
    (tmp_path / "b.txt").write_text("two", encoding="utf-8-sig")
    assert list(read_documents(tmp_path)) == ["one", "two"]


def by_hand(documents: list[str], tokenizer) -> list[int]:
    """Tokenize documents that are not blank, with the end token after each."""
    return [
        token
        for text in documents
        if text.strip()
        for token in (*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id)
    ]


BLANK = ["", " ", "\n", "\u2003\t"]


def test_blank_documents_are_left_out_of_every_part(tmp_path: Path, tokenizer) -> None:
    """In wikitext, every third row is blank; their checksum would put all of them among the held-out documents."""
    documents = [row for text in sentences(200) for row in (text, *BLANK)]
    assert is_held_out("")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in documents))
    counts = BlockCounts(seq_len=8, train=1_000, held_out=1_000)
    for text in (f"hub:{tmp_path}", str(tmp_path)):
        blocks = load_blocks(text, tokenizer, counts, seed=0)
        train, unseen = (
            split(documents) if text == str(tmp_path) else
            ([row for row in documents if not is_held_out(row)], [row for row in documents if is_held_out(row)])
        )  # fmt: skip
        for part, expected in (([blocks.train], train), ([blocks.validation, blocks.held_out], unseen)):
            ids = by_hand(expected, tokenizer)
            rows = {tuple(ids[start : start + 8]) for start in range(0, len(ids) - 7, 8)}
            assert {tuple(row) for row in torch.cat(part).tolist()} == rows


def test_a_document_without_tokens_leaves_no_end_token(tokenizer) -> None:
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.normalizer = normalizers.Replace("\u200b", "")
    bare = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    documents = ["one two", "\u200b", "three"]
    assert pack(documents, bare, 1, name="text").flatten().tolist() == by_hand(["one two", "three"], tokenizer)
    assert len(pack(["\u200b"], bare, 1, name="text", least=0)) == 0


def test_rows_of_a_data_set_that_are_null_are_blank(tmp_path: Path, tokenizer) -> None:
    documents = [None, *sentences(400), None]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in documents))
    blocks = load_blocks(f"hub:{tmp_path}", tokenizer, **SMALL)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in documents[1:-1]))
    again = load_blocks(f"hub:{tmp_path}", tokenizer, **SMALL)
    assert all(torch.equal(getattr(blocks, part), getattr(again, part)) for part in vars(blocks))


def test_tokens_that_the_model_does_not_know_are_named_with_both_sizes(tmp_path: Path, tokenizer) -> None:
    """The fixture's tokenizer is smaller than the model; the last of the tokens added to it has no embedding."""
    larger = copy.deepcopy(tokenizer)
    larger.add_tokens([f"<a{number}>" for number in range(20)])
    model = tiny_model("llama")
    assert (len(tokenizer), len(larger)) == (78, 98)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in sentences(400)))
    load_blocks(str(tmp_path), larger, **SMALL, model=model)  # the text does not contain the token
    for place in (5, 395):  # training text; held-out text
        rows = sentences(400)
        rows[place] += " <a19>"
        (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
        said = r"'<a19>' \(number 97\); the tokenizer has 98 tokens, the model embeddings for 97 only"
        with pytest.raises(GossamerError, match=said) as caught:
            load_blocks(str(tmp_path), larger, **SMALL, model=model)
        assert "\n" not in str(caught.value)
    starting = PreTrainedTokenizerFast(tokenizer_object=larger.backend_tokenizer, bos_token="<a19>")
    with pytest.raises(GossamerError, match="text 'self' has the token '<a19>'"):
        load_blocks("self", starting, **SMALL, model=model)


def test_blocks_are_a_function_of_the_seed_and_never_shared(text: Path, tokenizer) -> None:
    def load(seed: int):
        return load_blocks(str(text), tokenizer, BlockCounts(seq_len=16, train=50, validation=3, held_out=8), seed=seed)

    first, again, other = load(1), load(1), load(2)
    assert torch.equal(first.train, again.train)
    assert torch.equal(first.held_out, again.held_out)
    assert not torch.equal(first.train, other.train)
    assert torch.equal(first.held_out, other.held_out)
    assert first.train.shape == (50, 16)
    assert first.held_out.shape == (8, 16)
    documents = list(read_documents(text))
    train = pack(split(documents)[0], tokenizer, 16, name="text")
    rows = {tuple(row) for row in train.tolist()}
    assert all(tuple(row) in rows for row in first.train.tolist())


def test_validation_and_held_out_blocks_share_nothing(text: Path, tokenizer) -> None:
    blocks = load_blocks(str(text), tokenizer, BlockCounts(seq_len=16, train=5, validation=4, held_out=99), seed=1)
    unseen = pack(split(list(read_documents(text)))[1], tokenizer, 16, name="text")
    assert len(blocks.validation) == 4
    assert len(blocks.validation) + len(blocks.held_out) == len(unseen)
    assert sorted([*blocks.validation.tolist(), *blocks.held_out.tolist()]) == sorted(unseen.tolist())


def test_of_a_directory_the_end_of_each_file_is_held_out(tmp_path: Path, tokenizer) -> None:
    parts = {name: [f"{name} {row}" for row in sentences(200, seed)] for seed, name in enumerate(("one", "three"))}
    for name, documents in parts.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in documents))
    blocks = load_blocks(str(tmp_path), tokenizer, BlockCounts(seq_len=16, train=5, validation=2, held_out=99), seed=0)
    ends = [split(documents)[1] for documents in parts.values()]
    unseen = pack([*ends[0], *ends[1]], tokenizer, 16, name="text")
    assert min(map(len, ends)) > 5
    assert sorted([*blocks.validation.tolist(), *blocks.held_out.tolist()]) == sorted(unseen.tolist())


def test_a_short_text_comes_again_once_all_of_it_has_come(text: Path, tokenizer) -> None:
    packed = pack(split(list(read_documents(text)))[0], tokenizer, 16, name="text")
    wanted = 2 * len(packed) + 5
    blocks = load_blocks(
        str(text), tokenizer, BlockCounts(seq_len=16, train=wanted, validation=3, held_out=1), seed=0
    ).train
    assert len(blocks) == wanted
    first, second = blocks[: len(packed)], blocks[len(packed) : 2 * len(packed)]
    assert sorted(first.tolist()) == sorted(packed.tolist()) == sorted(second.tolist())


def test_self_sampled_text_is_a_function_of_the_seed_and_leaves_the_global_state(tokenizer) -> None:
    model = tiny_model("llama")
    state = torch.random.get_rng_state()
    told: list[tuple[int, int]] = []
    first = sample_blocks(
        model, tokenizer, 5, 12, seed=3, batch_size=2, progress=lambda done, total: told.append((done, total))
    )
    assert told == [(2, 5), (4, 5), (5, 5)]
    assert torch.equal(state, torch.random.get_rng_state())
    assert first.shape == (5, 12)
    assert (first[:, 0] == tokenizer.bos_token_id).all()
    assert torch.equal(first, sample_blocks(model, tokenizer, 5, 12, seed=3, batch_size=2))
    assert not torch.equal(first, sample_blocks(model, tokenizer, 5, 12, seed=4, batch_size=2))
    blocks = load_blocks(
        "self", tokenizer, BlockCounts(seq_len=12, train=3, validation=3, held_out=2), seed=3, model=model
    )
    assert blocks.train.shape == (3, 12)
    assert blocks.held_out.shape == (2, 12)


def test_self_sampled_text_is_the_models_whatever_its_generation_settings(tokenizer) -> None:
    model = tiny_model("llama")
    expected = sample_blocks(model, tokenizer, 4, 12, seed=3)
    settings = GenerationConfig(
        do_sample=True, min_p=0.5, no_repeat_ngram_size=1, suppress_tokens=list(range(9)), eos_token_id=list(range(50))
    )
    model.generation_config = settings
    model.train()
    assert torch.equal(sample_blocks(model, tokenizer, 4, 12, seed=3), expected)
    assert model.generation_config is settings
    assert model.training


def test_text_is_not_sampled_without_a_token_to_start_from(tokenizer) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(GossamerError, match="start or end token"):
        sample_blocks(tiny_model("llama"), bare, 4, 12, seed=3)


def test_self_sampled_text_has_the_distribution_of_the_model(tokenizer) -> None:
    model = tiny_model("llama")
    sampled = sample_blocks(model, tokenizer, 2000, 2, seed=0, batch_size=1000)[:, 1]
    with torch.no_grad():
        p = model(input_ids=torch.tensor([[tokenizer.bos_token_id]])).logits[0, 0].softmax(-1)
    share = torch.bincount(sampled, minlength=97) / 2000
    assert ((share - p).abs() < 4.5 * (p * (1 - p) / 2000).sqrt() + 1e-3).all()


BAD_FILES = {
    "data.csv": (b"a,b", "unknown kind"),
    "empty.txt": (b"", "is empty"),
    "blank.jsonl": (b'{"text": "  "}\n', "is empty"),
    "short.txt": (b"one two", "shorter than one block"),
    "broken.jsonl": (b'{"text": "one"}\n{"text": \n', "line 2: not valid JSON"),
    "keyless.jsonl": (b'{"body": "one"}\n', "line 1: no string under the key 'text'"),
    "number.jsonl": (b'{"text": 3}\n', "line 1: no string under the key 'text'"),
    "latin.txt": ("é".encode("latin-1") * 9, "not UTF-8"),
    "cut.txt.gz": (gzip.compress(b"one two three" * 99)[:-20], "not a whole gzip file"),
    "plain.txt.gz": (b"one two", "not a whole gzip file"),
    "corrupt.txt.gz": (gzip.compress(b"one two")[:10] + b"\xff" * 20, "not a whole gzip file"),
    "deep.jsonl": (b"[" * 100_000, "line 1: not valid JSON"),
    "half.jsonl": (b'{"text": "one"}\n{"text": "\\ud83d"}\n', "line 2: the text holds half a character"),
    "tail.txt": (b"one two " * 30, "held-out part.*shorter than 2 blocks"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_faults_of_files_are_named(name: str, tmp_path: Path, tokenizer) -> None:
    content, message = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(GossamerError, match=message) as caught:
        load_blocks(str(tmp_path / name), tokenizer, BlockCounts(seq_len=16, train=4, validation=3, held_out=2), seed=0)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name,message",
    [
        ("missing.txt", "no such file"),
        ("/no/such/place", "no such file"),
        ("", "no such file"),
        ("x" * 300 + ".txt", "no such file"),
    ],
)
def test_missing_text_is_named(name: str, message: str, tokenizer) -> None:
    with pytest.raises(GossamerError, match=message):
        load_blocks(name, tokenizer, **SMALL)


@pytest.mark.parametrize("name", ["nobody/nothing", "hub:nobody/nothing:config:split"])
def test_a_hub_data_set_out_of_reach_is_named(name: str, monkeypatch: pytest.MonkeyPatch, tokenizer) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(GossamerError, match=f"no text {name}"):
        load_blocks(name, tokenizer, **SMALL)


@pytest.fixture
def data_set(tmp_path: Path) -> Path:
    """A data set in the layout of the Hub; configuration ``b`` has no text."""
    for name, key in (("a", "text"), ("b", "body")):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({key: s}) + "\n" for s in sentences(400)))
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n"
        "- config_name: a\n  data_files:\n  - {split: train, path: a.jsonl}\n  - {split: test, path: a.jsonl}\n"
        "- config_name: b\n  data_files: b.jsonl\n---\n"
    )
    return tmp_path


@pytest.mark.parametrize("choice", [":a", ":a:test"])
def test_a_hub_data_set_is_read_as_a_file_is(choice: str, data_set: Path, tokenizer) -> None:
    blocks = load_blocks(f"hub:{data_set}{choice}", tokenizer, **SMALL)
    again = load_blocks(f"hub:{data_set}{choice}", tokenizer, **SMALL)
    assert all(torch.equal(getattr(blocks, part), getattr(again, part)) for part in vars(blocks))
    assert [len(part) for part in vars(blocks).values()] == [4, 3, 2]
    read = split_by_checksum(sentences(400))
    for documents, part in zip((*read, read[1]), (blocks.train, blocks.validation, blocks.held_out), strict=True):
        rows = {tuple(row) for row in pack(documents, tokenizer, 16, name="text").tolist()}
        assert all(tuple(row) in rows for row in part.tolist())


def test_however_much_of_a_hub_data_set_is_read_what_is_held_out_stays_unseen(data_set: Path, tokenizer) -> None:
    """Neither another length nor a run that starts from this one is measured on text that was trained on."""
    most = load_blocks(f"hub:{data_set}:a", tokenizer, replace(COUNTS, train=300), seed=0)
    few = load_blocks(f"hub:{data_set}:a", tokenizer, BlockCounts(seq_len=8, validation=3, held_out=9), seed=0)
    trained = {tuple(window.tolist()) for block in most.train for window in block.unfold(0, 8, 1)}
    assert len(trained) > 1000
    unseen = [tuple(row) for row in few.held_out.tolist()]
    assert len(unseen) == 9
    assert not trained & set(unseen)


@pytest.mark.parametrize(
    "choice,message", [(":b", "no column 'text' of strings, only body"), ("", "Config name is missing"), (":a:c", "c")]
)
def test_faults_of_hub_data_sets_are_named(choice: str, message: str, data_set: Path, tokenizer) -> None:
    with pytest.raises(GossamerError, match=message) as caught:
        load_blocks(f"hub:{data_set}{choice}", tokenizer, **SMALL)
    assert str(data_set) + choice in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "named", "pinned"),
    [
        ("org/text", ("org/text", "", "", ""), "hub:org/text@c0"),
        ("hub:org/text@v1", ("org/text", "v1", "", ""), "hub:org/text@c0"),
        ("org/text:a", ("org/text", "", "a", ""), "hub:org/text@c0:a"),
        ("hub:text@main:a:test", ("text", "main", "a", "test"), "hub:text@c0:a:test"),
        ("org/text::test", ("org/text", "", "", "test"), "hub:org/text@c0::test"),
        ("org/text:a:train[:50%]", ("org/text", "", "a", "train[:50%]"), "hub:org/text@c0:a:train[:50%]"),
    ],
)
def test_what_a_text_says_of_a_data_set(text: str, named: tuple[str, ...], pinned: str) -> None:
    assert DataSet.of(text) == named
    assert at_commit(text, None) == text
    assert at_commit(text, "c0") == pinned
    assert DataSet.of(pinned) == (named[0], "c0", *named[2:])


def test_a_folder_may_have_any_name(tmp_path: Path) -> None:
    (tmp_path / "a@b").mkdir()
    assert DataSet.of(f"hub:{tmp_path}/a@b:x") == (f"{tmp_path}/a@b", "", "x", "")
    assert data_set_commit(f"hub:{tmp_path}/a@b:x") is None


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, tokenizer) -> None:
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(GossamerError, match=r"gone\.txt cannot be read: No such file"):
        load_blocks(str(tmp_path), tokenizer, **SMALL)


def test_an_empty_directory_is_named(tmp_path: Path, tokenizer) -> None:
    with pytest.raises(GossamerError, match="holds no text"):
        load_blocks(str(tmp_path), tokenizer, BlockCounts(seq_len=16, train=4, validation=3, held_out=2), seed=0)
