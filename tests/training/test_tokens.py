"""Long documents tokenized in pieces: the tokens equal those of the whole, and no more is tokenized than needed."""

import json
import random
from collections.abc import Iterator
from itertools import chain
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from conftest import WORDS, sentences
from gossamer.training import tokens
from gossamer.training.data import pack
from gossamer.training.tokens import tokens_of

FOREIGN = ["é", "e\u0301", "🙂", "👨‍👩‍👧", "中文", "\u200b", "ﬁ", "İ"]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def awkward(length: int, seed: int) -> str:
    """Create text that is hard to cut: words and runs of spaces, lines, digits, letters, marks and special tokens."""
    source = random.Random(seed)
    parts = {
        "spaces": lambda: " " * source.choice([1, 2, 40, 300]),
        "lines": lambda: "\n" * source.choice([1, 2, 3, 50]),
        "white": lambda: "".join(source.choices("\t \n\r\u00a0\u2028", k=source.choice([2, 9, 300]))),
        "digits": lambda: "".join(source.choices("0123456789", k=source.choice([1, 3, 4, 300]))),
        "letter": lambda: "a" * source.choice([1, 90, 900]),
        "letters": lambda: "".join(source.choices("ACGT", k=source.choice([10, 400]))),
        "marks": lambda: "".join(source.choices("!?.,;:-_'\"()[]", k=source.choice([1, 2, 300]))),
        "foreign": lambda: source.choice(FOREIGN) * source.randrange(1, 9),
        "special": lambda: source.choice([*SPECIAL, " </s> "]),
    }
    written: list[str] = []
    while sum(map(len, written)) < length:
        kind = source.choice([*parts, *["words"] * 5])
        words = " ".join(source.choices(WORDS, k=source.randrange(1, 60))) + source.choice([" ", ". ", "\n", ""])
        written.append(words if kind == "words" else parts[kind]())
    return "".join(written)


def trained(
    model: models.Model,
    trainer: type,
    pre_tokenizer: pre_tokenizers.PreTokenizer,
    normalizer: normalizers.Normalizer | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Train a tokenizer on awkward text; return its JSON description."""
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        backend.normalizer = normalizer
    corpus = [awkward(2_000, seed) for seed in range(100, 120)]
    backend.train_from_iterator(corpus, trainer(vocab_size=500, special_tokens=SPECIAL, **options))
    return json.loads(backend.to_str())


def byte_level(*before: pre_tokenizers.PreTokenizer, prefix: bool = False, regex: bool = True, **settings: Any):
    level = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=regex)
    steps = pre_tokenizers.Sequence([*before, level])
    return trained(models.BPE(**settings), trainers.BpeTrainer, steps, initial_alphabet=level.alphabet())


def metaspace() -> dict[str, Any]:
    return trained(models.BPE(unk_token="<unk>"), trainers.BpeTrainer, pre_tokenizers.Metaspace())


def llama_2() -> dict[str, Any]:
    """A tokenizer without word splitting: a prefix before the text, and byte-pair encoding of all of it."""
    spaces = [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    return {**metaspace(), "pre_tokenizer": None, "normalizer": {"type": "Sequence", "normalizers": spaces}}


def split_by(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


KINDS = {
    "whitespace": lambda: trained(models.BPE(unk_token="<unk>"), trainers.BpeTrainer, pre_tokenizers.Whitespace()),
    "gpt2": byte_level,
    "gpt2 with a prefix": lambda: byte_level(prefix=True),
    "llama 3": lambda: byte_level(split_by(LLAMA_3), regex=False, ignore_merges=True),
    "digits from the right": lambda: byte_level(split_by(r"\d{1,3}(?=(?:\d{3})*\b)")),
    "metaspace": metaspace,
    "llama 2": llama_2,
    "unigram": lambda: trained(
        models.Unigram(), trainers.UnigramTrainer, pre_tokenizers.Metaspace(), normalizers.NFKC(), unk_token="<unk>"
    ),
    "bert": lambda: trained(
        models.WordPiece(unk_token="<unk>"), trainers.WordPieceTrainer, pre_tokenizers.BertPreTokenizer(),
        normalizers.BertNormalizer(),
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def any_tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    backend = Tokenizer.from_str(json.dumps(KINDS[request.param]()))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "PIECE", 2_048)
    monkeypatch.setattr(tokens, "OVERLAP", 512)


@pytest.mark.parametrize("seed", range(4))
def test_a_document_in_pieces_has_the_tokens_of_the_whole(
    seed: int, any_tokenizer: PreTrainedTokenizerFast, small_pieces: None
) -> None:
    document = awkward(30_000, seed)
    whole = any_tokenizer(document, add_special_tokens=False)["input_ids"]
    pieces = list(tokens_of([document], any_tokenizer))
    assert len(pieces) > 3
    assert list(chain.from_iterable(pieces)) == [*whole, any_tokenizer.eos_token_id]


@pytest.mark.parametrize("run", ["a", " ", "ab", "1", "\n", "中", "</s>"])
def test_a_word_without_end_has_the_tokens_of_the_whole(
    run: str, any_tokenizer: PreTrainedTokenizerFast, small_pieces: None
) -> None:
    document = f"one two {run * 9_001} three"
    whole = any_tokenizer(document, add_special_tokens=False)["input_ids"]
    assert list(chain.from_iterable(tokens_of([document], any_tokenizer))) == [*whole, any_tokenizer.eos_token_id]


def test_long_and_short_documents_come_in_their_order(tokenizer: PreTrainedTokenizerFast, small_pieces: None) -> None:
    documents = ["one", awkward(9_000, 0), "two", "", "three", *sentences(90), awkward(2_000, 1), awkward(2_000, 2)]
    encoded = [tokenizer(document, add_special_tokens=False)["input_ids"] for document in documents]
    expected = [token for ids in encoded if ids for token in (*ids, tokenizer.eos_token_id)]
    assert list(chain.from_iterable(tokens_of(documents, tokenizer))) == expected


class Counting(PreTrainedTokenizerFast):
    """Records the number of characters in each call."""

    def __call__(self, text: str | list[str], **options: Any) -> Any:
        self.given.append(len(text) if isinstance(text, str) else sum(map(len, text)))
        return super().__call__(text, **options)


def test_no_more_is_tokenised_than_is_needed(tokenizer: PreTrainedTokenizerFast) -> None:
    counting = Counting(tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>")
    counting.given = []
    document = "\n".join(sentences(16_000))
    assert len(document) > 5 * tokens.PIECE
    blocks = pack([document], counting, 16, name="text", most=16)
    assert max(counting.given) == tokens.PIECE + tokens.OVERLAP
    assert len(counting.given) == 2
    ids = tokenizer(document[:9_000], add_special_tokens=False)["input_ids"]
    assert blocks.flatten().tolist() == ids[:256]


def test_documents_are_read_no_further_than_a_piece(tokenizer: PreTrainedTokenizerFast, small_pieces: None) -> None:
    def documents() -> Iterator[str]:
        for _ in range(1_000):
            read.append(0)
            yield "one two three four " * 20

    read: list[int] = []
    next(tokens_of(documents(), tokenizer))
    assert len(read) <= tokens.PIECE // 380 + 1
