"""Tokenise documents. A long document is tokenised in pieces, with the same result as in one call.

A tokenizer uses about 150 bytes of memory per token of its input. So a long document is tokenised in overlapping
windows, and two windows are joined where they agree: over most of the overlap they must have the same tokens for the
same characters. From there on the second window is correct:

- A pre-tokenizer reads from left to right. Where both windows begin a word, all later words are the same, and each
  word is encoded separately.
- Within a word, byte-pair encoding is correct if every pair of neighbouring tokens is the encoding of their characters
  alone; both windows contain the pair at the seam.

Where two windows do not agree, such as inside a very long word, the first one is extended.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from operator import itemgetter

from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase

PIECE = 1 << 17
"""Characters tokenised per call."""

OVERLAP = 1 << 12
"""Characters that two windows share; the outer quarter at each end is not compared."""

_DOCUMENTS_AT_ONCE = 32


def end_of_text(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token that is put after each document, if the tokenizer has a suitable one."""
    special = (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.sep_token_id)
    return [token for token in special if token is not None][:1]


def tokens_of(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Tokenise documents in batches; yield parts of any length, with the end-of-text token after each document.

    A document without tokens yields nothing, not even an end-of-text token.
    """
    end = end_of_text(tokenizer)
    for batch in _batches(documents):
        if len(batch) == 1:
            yield from document_tokens(batch[0], tokenizer)
        else:
            for ids in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]:
                yield ids + end if ids else []


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    """Group documents into batches, limited in number and characters; a longer document is a batch of its own."""
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
    """Tokenise one document piece by piece; end with the end-of-text token unless there were no tokens."""
    empty = True
    for ids in _pieces(document, tokenizer):
        if ids:
            empty = False
            yield ids
    if not empty and (end := end_of_text(tokenizer)):
        yield end


def _pieces(document: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    if len(document) <= PIECE or not tokenizer.is_fast:  # slow tokenizers have no offsets
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
        ids: token ids.
        spans: the characters of the document that each token covers.
        words: index of the word in the part that each token belongs to.
    """

    ids: list[int]
    spans: list[tuple[int, int]]
    words: list[int | None]

    @classmethod
    def of(cls, document: str, start: int, stop: int, tokenizer: PreTrainedTokenizerBase) -> "_Window":
        """Tokenise ``document[start:stop]``."""
        encoded = tokenizer([document[start:stop]], add_special_tokens=False, verbose=False)
        encoding = encoded.encodings[0]
        spans = [(start + before, start + after) for before, after in encoding.offsets]
        return cls(encoded["input_ids"][0], spans, encoding.word_ids)

    def within(self, low: int, high: int) -> slice:
        """The slice of tokens between the characters ``low`` and ``high``."""
        begin = bisect_left(self.spans, low, key=itemgetter(0))
        return slice(begin, max(begin, bisect_right(self.spans, high, key=itemgetter(1))))

    def begins_word(self, index: int) -> bool:
        """Whether a token, other than the first of the window, is the first of a word."""
        return self.words[index] != self.words[index - 1]


def _seam(left: _Window, right: _Window, low: int, high: int, *, anywhere: bool) -> tuple[int, int] | None:
    """Find the first token after the seam in each window; None if the windows disagree between ``low`` and ``high``.

    The seam is the start of a word in both windows that is closest to the middle; with ``anywhere``, the start of any
    token if there is no such word.
    """
    a, b = left.within(low, high), right.within(low, high)
    if left.ids[a] != right.ids[b] or left.spans[a] != right.spans[b]:
        return None
    count = a.stop - a.start
    places = range(1, count)
    words = [place for place in places if left.begins_word(a.start + place) and right.begins_word(b.start + place)]
    chosen = min(words or (places if anywhere else ()), key=lambda place: abs(2 * place - count), default=None)
    return None if chosen is None else (a.start + chosen, b.start + chosen)
