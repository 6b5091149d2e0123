"""Text -> blocks of tokens, split into training and held-out text.

documents  ->  held out: the last 5 % of each file's characters, or of a Hub data set one document in 20
           ->  tokens, joined by the end-of-text token  ->  blocks of exactly seq_len tokens, the ragged tail dropped
           ->  a seeded choice of blocks
"""

import math
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import Dataset
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from gossamer.errors import GossamerError
from gossamer.models.vocabulary import require_embeddings
from gossamer.names import SELF
from gossamer.training.documents import HUB, is_local, read_documents, text_files
from gossamer.training.tokens import tokens_of

if TYPE_CHECKING:
    from datasets import IterableDataset

HELD_OUT = 0.05
"""Share of a file's characters that is held out, at its end."""

ONE_IN = 20
"""One document in so many is held out, where the end of the text is not known."""

_CHARACTERS_PER_TOKEN = 8
"""More than text in any language needs: how much of a Hub data set is read for a number of tokens."""

_READ_WHOLE = 2**24
"""Tokens of a text up to which all of its blocks can be chosen."""

_CHOICE = 20
"""Of a longer text, blocks to choose from for each one wanted."""


@dataclass(frozen=True)
class Blocks:
    """Token blocks, ``[blocks, seq_len]``; no token is in two of the parts.

    Attributes:
        train: to train on.
        validation: unseen text that the multiplier is steered by.
        held_out: unseen text that metrics are reported on.
    """

    train: Int[Tensor, "blocks tokens"]
    validation: Int[Tensor, "blocks tokens"]
    held_out: Int[Tensor, "blocks tokens"]


@dataclass(frozen=True)
class BlockCounts:
    """How many blocks of each part, and how long.

    Attributes:
        seq_len: tokens in a block.
        train: training blocks.
        validation: at most so many validation blocks.
        held_out: at most so many held-out blocks.
    """

    seq_len: int
    train: int = 1
    validation: int = 1
    held_out: int = 1


class BlockDataset(Dataset[dict[str, Tensor]]):
    """Blocks as transformers' Trainer takes them: ``{"input_ids": [seq_len]}``."""

    def __init__(self, blocks: Int[Tensor, "blocks tokens"]) -> None:
        self.blocks = blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.blocks[index]}


def load_blocks(
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    counts: BlockCounts,
    *,
    seed: int,
    model: PreTrainedModel | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Blocks:
    """Training and held-out blocks of a text; the same arguments give the same blocks.

    Args:
        text: a local file (see :mod:`gossamer.training.documents`), a directory of such files, the id of
            a Hub data set with a column ``text`` as ``[hub:]NAME[:CONFIG[:SPLIT]]``, or ``self``.
        tokenizer: of the model.
        counts: how many blocks. Training blocks are a seeded choice among all there are (of a very long text, among
            the first 20 times as many); of a text with fewer, blocks come again once all have come. Validation blocks
            are evenly spaced over the held-out text and at most a third of it, held-out blocks over the rest of it.
        seed: of the choice, and of the text sampled from the model.
        model: for ``self``, and to see that it knows the tokens.
        progress: called with the number of blocks sampled so far, and of all, for ``self``.

    Raises:
        GossamerError: naming the text and what is wrong with it.
    """
    if text == SELF:
        if model is None:
            raise ValueError("text 'self' needs the model")
        sizes = (counts.train, counts.validation, counts.held_out)
        sampled = sample_blocks(model, tokenizer, sum(sizes), counts.seq_len, seed=seed, progress=progress)
        return Blocks(*sampled.split(sizes))
    if is_local(text):
        files = [list(read_documents(file)) for file in text_files(Path(text))]
        parts, held_out_name = list(map(split, files)), f"its last {HELD_OUT:.0%}"
    else:
        blocks = max(counts.train / (1 - HELD_OUT), (counts.validation + counts.held_out) / HELD_OUT)
        documents = list(_read_hub(text, characters=math.ceil(blocks * counts.seq_len * _CHARACTERS_PER_TOKEN)))
        parts, held_out_name = [split_by_checksum(documents)], f"one document in {ONE_IN}"
    train, held_out = (list(chain.from_iterable(part)) for part in zip(*parts, strict=True))
    if not any(document.strip() for document in chain(train, held_out)):
        raise GossamerError(f"{text} is empty; give text to train on")
    most = max(_CHOICE * counts.train, _READ_WHOLE // counts.seq_len)
    train_packed = pack(train, tokenizer, counts.seq_len, name=f"{text} (training part)", most=most)
    unseen = pack(held_out, tokenizer, counts.seq_len, name=f"{text} (held-out part, {held_out_name})", least=2)
    if model is not None:
        for part in (train_packed, unseen):
            require_embeddings(model, tokenizer, part, text)
    validation = _spaced(len(unseen), min(counts.validation, max(1, len(unseen) // 3)))
    rest = torch.ones(len(unseen), dtype=torch.bool).index_fill_(0, validation, False).nonzero().flatten()
    reported = rest[_spaced(len(rest), counts.held_out)]
    generator = torch.Generator().manual_seed(seed)
    rounds = math.ceil(counts.train / len(train_packed))
    chosen = torch.cat([torch.randperm(len(train_packed), generator=generator) for _ in range(rounds)])[: counts.train]
    return Blocks(train_packed[chosen], unseen[validation], unseen[reported])


def _spaced(count: int, chosen: int) -> Int[Tensor, " chosen"]:
    """At most ``chosen`` of ``count`` indices, evenly spaced, each once."""
    step = max(1.0, count / chosen)
    return (torch.arange(min(chosen, count)) * step + step / 2 - 0.5).round().long().clamp(max=count - 1).unique()


def hub_stream(text: str) -> "IterableDataset":
    """The rows of the Hub data set ``[hub:]NAME[:CONFIG[:SPLIT]]``, read when asked for: the column ``text`` alone.

    Raises:
        GossamerError: if there is no such data set within reach, or it has no such column.
    """
    from datasets import load_dataset

    name, config, part = (*text.removeprefix(HUB).split(":", 2), "", "")[:3]
    with hub_faults(text):
        rows = load_dataset(name, config or None, split=part or "train", streaming=True)
        first = next(iter(rows), {"text": ""})
        if not isinstance(first.get("text", 0), str | None):
            columns = ", ".join(first)
            raise GossamerError(f"the data set {text} has no column 'text' of strings, only {columns}")
        return rows.select_columns("text")


def _read_hub(text: str, *, characters: int) -> Iterator[str]:
    """The first documents of a Hub data set, until there are enough characters."""
    with hub_faults(text):
        for row in hub_stream(text):
            document = row["text"] or ""  # of a column that has nulls
            yield document
            characters -= len(document)
            if characters <= 0:
                return


@contextmanager
def hub_faults(text: str) -> Iterator[None]:
    """Turn whatever goes wrong with a Hub data set into a GossamerError."""
    try:
        yield
    except GossamerError:
        raise
    except Exception as error:  # the Hub client raises dozens of kinds, all of them a data set out of reach
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise GossamerError(
            f"no text {text}: there is no such file, and as a Hub data set it cannot be read ({reason})"
        ) from error


def split(documents: list[str]) -> tuple[list[str], list[str]]:
    """Training documents and held-out ones: the last 5 % of the characters, cutting the document at the border.

    Blank ones are left out.
    """
    cut = round(sum(map(len, documents)) * (1 - HELD_OUT))
    train, held_out = [], []
    for document in documents:
        before, after = document[: max(cut, 0)], document[max(cut, 0) :]
        train += [before] if before.strip() else []
        held_out += [after] if after.strip() else []
        cut -= len(document)
    return train, held_out


def is_held_out(document: str) -> bool:
    """Whether a document is held out: it depends on nothing but its text, so copies of it are too."""
    return zlib.crc32(document.encode(errors="replace")) % ONE_IN == 0


def part_of(document: str | None) -> Literal["train", "held out"] | None:
    """The part that a document belongs to by its checksum; None if it is blank, which stands for nothing."""
    if not document or not document.strip():
        return None
    return "held out" if is_held_out(document) else "train"


def split_by_checksum(documents: list[str]) -> tuple[list[str], list[str]]:
    """Training documents and held-out ones, the same however much of the text was read; none that are blank."""
    parts = list(map(part_of, documents))
    train, held_out = (
        [document for document, part in zip(documents, parts, strict=True) if part == wanted]
        for wanted in ("train", "held out")
    )
    return train, held_out


def pack(
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
    *,
    name: str,
    least: int = 1,
    most: int | None = None,
) -> Int[Tensor, "blocks tokens"]:
    """Documents as blocks of ``seq_len`` tokens, the end-of-text token after each document.

    No more is read and tokenised than ``most`` blocks need, give or take a batch of documents or a piece of one.

    Raises:
        GossamerError: if there are not enough tokens for ``least`` blocks; ``name`` says of what.
    """
    wanted = math.inf if most is None else most * seq_len
    parts, count = [torch.empty(0, dtype=torch.int32)], 0
    for ids in tokens_of(documents, tokenizer):
        parts.append(torch.tensor(ids, dtype=torch.int32))
        count += len(ids)
        if count >= wanted:
            break
    blocks = int(min(count, wanted)) // seq_len
    if blocks < least:
        raise GossamerError(
            f"{name} has {count} tokens, shorter than {'one block' if least == 1 else f'{least} blocks'} "
            f"of {seq_len}; give more text or a smaller --seq-len"
        )
    return torch.cat(parts)[: blocks * seq_len].long().view(blocks, seq_len)


def sample_blocks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    blocks: int,
    seq_len: int,
    *,
    seed: int,
    batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> Int[Tensor, "blocks tokens"]:
    """Text sampled from the model at temperature 1, each block starting with the start-of-text token.

    The end-of-text token does not end a block: what the model says after it belongs to the text. The model's
    own generation settings are set aside, and the global random state is left as it was. ``progress`` is called after
    every batch with the number of blocks so far, and of all.

    Raises:
        GossamerError: if the tokenizer has no token to start from, or the model does not know it.
    """
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise GossamerError("text 'self' needs a tokenizer with a start or end token; give a text instead")
    require_embeddings(model, tokenizer, torch.tensor([start]), "text 'self'")
    device = next(model.parameters()).device
    rows = []
    with torch.random.fork_rng(), _unadorned(model):
        torch.manual_seed(seed)
        for first in range(0, blocks, batch_size):
            count = min(batch_size, blocks - first)
            rows.append(
                model.generate(
                    input_ids=torch.full((count, 1), start, device=device),
                    attention_mask=torch.ones(count, 1, dtype=torch.long, device=device),
                    do_sample=True,
                    top_k=0,
                    max_new_tokens=seq_len - 1,
                ).cpu()
            )
            if progress is not None:
                progress(first + count, blocks)
    return torch.cat(rows)


@contextmanager
def _unadorned(model: PreTrainedModel) -> Iterator[None]:
    """The model without dropout and without the generation settings it was published with.

    Those would be merged into every call of ``generate``: an end token, penalties, suppressed tokens.
    """
    settings, training = model.generation_config, model.training
    model.generation_config = GenerationConfig()
    model.eval()
    try:
        yield
    finally:
        model.generation_config = settings
        model.train(training)
