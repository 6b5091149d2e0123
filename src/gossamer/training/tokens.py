"""Documents -> tokens. A long document is tokenised a piece at a time, to the same tokens as in one go.

A tokenizer keeps some 150 bytes for each token of what it is given at once. So a long document goes through it in
windows that overlap, and two windows are joined where they agree: over most of the overlap they have to give the same
tokens of the same characters. From there on the second one is right:

- A pre-tokenizer reads from left to right. Where both windows begin a word, the words after it are the same, and each
  word is encoded by itself.
- Within a word, byte-pair encoding is right if every pair of neighbours is what their characters alone are encoded to;
  the pair at the seam stands in both windows.

Where two windows do not agree, as in the middle of a word without end, the first one is made longer.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from operator import itemgetter

from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase

PIECE = 1 << 17
"""Characters that are tokenised at once."""

OVERLAP = 1 << 12
"""Characters that two windows share; within a quarter of it from their ends nothing is compared."""

_DOCUMENTS_AT_ONCE = 32


def end_of_text(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token that stands after each document, if the tokenizer has one for it."""
    special = (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.sep_token_id)
    return [token for token in special if token is not None][:1]


def tokens_of(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """The tokens of documents, the end-of-text token after each, in parts of any length.

    Documents are read in batches. One without tokens leaves nothing, no end-of-text token either.
    """
    end = end_of_text(tokenizer)
    for batch in _batches(documents):
        if len(batch) == 1:
            yield from document_tokens(batch[0], tokenizer)
        else:
            for ids in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]:
                yield ids + end if ids else []


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    """So many documents at once, and together no more characters than a piece has, but for a single one."""
    batch: list[str] = []
    characters = 0
    for document in documents:
        if batch and characters + len(document) > PIECE:
            yield batch
            batch, characters = [], 0
        batch.append(document)
        characters += len(document)
        if len(batch) == _DOCUMENTS_AT_ONCE or characters >= PIECE:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def document_tokens(document: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """The tokens of one document, a piece at a time, and last the end-of-text token if there were any."""
    empty = True
    for ids in _pieces(document, tokenizer):
        if ids:
            empty = False
            yield ids
    if not empty and (end := end_of_text(tokenizer)):
        yield end


def _pieces(document: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    if len(document) <= PIECE or not tokenizer.is_fast:  # the others do not say where a token comes from
        yield tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        return
    by_pairs = isinstance(tokenizer.backend_tokenizer.model, BPE)
    start, stop, first = 0, PIECE, 0
    window = _Window.of(document, start, stop, tokenizer)
    while stop < len(document):
        begin = stop - OVERLAP
        following = _Window.of(document, begin, stop + PIECE, tokenizer)
        seam = _seam(window, following, begin + OVERLAP // 4, stop - OVERLAP // 4, anywhere=by_pairs)
        if seam is None:
            stop += stop - start
            window = _Window.of(document, start, stop, tokenizer)
        else:
            yield window.ids[first : seam[0]]
            window, first = following, seam[1]
            start, stop = begin, stop + PIECE
    yield window.ids[first:]


@dataclass(frozen=True)
class _Window:
    """The tokens of a part of a document.

    Attributes:
        ids: of the tokens.
        spans: which characters of the document each one stands for.
        words: which word of the part each one belongs to.
    """

    ids: list[int]
    spans: list[tuple[int, int]]
    words: list[int | None]

    @classmethod
    def of(cls, document: str, start: int, stop: int, tokenizer: PreTrainedTokenizerBase) -> "_Window":
        """The tokens of ``document[start:stop]``."""
        encoded = tokenizer([document[start:stop]], add_special_tokens=False, verbose=False)
        encoding = encoded.encodings[0]
        spans = [(start + before, start + after) for before, after in encoding.offsets]
        return cls(encoded["input_ids"][0], spans, encoding.word_ids)

    def within(self, low: int, high: int) -> slice:
        """The tokens of the characters from ``low`` to ``high``."""
        begin = bisect_left(self.spans, low, key=itemgetter(0))
        return slice(begin, max(begin, bisect_right(self.spans, high, key=itemgetter(1))))

    def begins_word(self, index: int) -> bool:
        """Whether a token is the first of a word; not asked of the first token."""
        return self.words[index] != self.words[index - 1]


def _seam(left: _Window, right: _Window, low: int, high: int, *, anywhere: bool) -> tuple[int, int] | None:
    """The token of each window that begins what comes after the seam; None if they do not agree.

    Between ``low`` and ``high`` they have to. The seam is the place nearest to the middle where both begin a word;
    ``anywhere``: of any token, if there is no word.
    """
    a, b = left.within(low, high), right.within(low, high)
    if left.ids[a] != right.ids[b] or left.spans[a] != right.spans[b]:
        return None
    count = a.stop - a.start
    places = range(1, count)
    words = [place for place in places if left.begins_word(a.start + place) and right.begins_word(b.start + place)]
    chosen = min(words or (places if anywhere else ()), key=lambda place: abs(2 * place - count), default=None)
    return None if chosen is None else (a.start + chosen, b.start + chosen)
