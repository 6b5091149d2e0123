"""Turn text into blocks of tokens, split into training and held-out text.

documents  ->  held out: the last 5 % of each file's characters; of a Hub data set, one document in 20
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
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import Dataset
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from gossamer.errors import GossamerError
from gossamer.models.vocabulary import require_embeddings
from gossamer.names import SELF
from gossamer.training.data_sets import hub_faults, hub_stream
from gossamer.training.documents import is_local, read_documents, text_files
from gossamer.training.tokens import tokens_of

HELD_OUT = 0.05
"""Share of a file's characters, at its end, that is held out."""

ONE_IN = 20
"""One in this many documents is held out where the length of the text is unknown."""

_CHARACTERS_PER_TOKEN = 8
"""Characters of a Hub data set to read per token; more than text in any language needs."""

_READ_WHOLE = 2**24
"""Up to this many tokens of a text, training blocks are chosen among all of its blocks."""

_CHOICE = 20
"""In a longer text, the number of blocks to choose from per requested block."""


@dataclass(frozen=True)
class Blocks:
    """Token blocks, ``[blocks, seq_len]``; the three parts do not overlap.

    Attributes:
        train: training blocks.
        validation: unseen blocks that steer the multiplier.
        held_out: unseen blocks for the reported metrics.
    """

    train: Int[Tensor, "blocks tokens"]
    validation: Int[Tensor, "blocks tokens"]
    held_out: Int[Tensor, "blocks tokens"]


@dataclass(frozen=True)
class BlockCounts:
    """Number of blocks of each part, and their length.

    Attributes:
        seq_len: tokens in a block.
        train: training blocks.
        validation: maximum number of validation blocks.
        held_out: maximum number of held-out blocks.
    """

    seq_len: int
    train: int = 1
    validation: int = 1
    held_out: int = 1


class BlockDataset(Dataset[dict[str, Tensor]]):
    """Blocks in the form that transformers' Trainer expects: ``{"input_ids": [seq_len]}``."""

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
    """Load training and held-out blocks of a text; deterministic in its arguments.

    Args:
        text: a local file (see :mod:`gossamer.training.documents`), a directory of such files, the id of
            a Hub data set with a column ``text`` as ``[hub:]NAME[@REVISION][:CONFIG[:SPLIT]]``, or ``self``.
        tokenizer: of the model.
        counts: how many blocks. Training blocks are chosen at random from all blocks of the text; of a very long text,
            from the first 20 times as many, or those in the first 2**24 tokens if that is more. If the text has too
            few, they repeat once all have been used. Validation blocks are evenly spaced over the held-out text and
            take up at most a third of it; held-out blocks are evenly spaced over the rest.
        seed: seed of the choice, and of the text sampled from the model.
        model: samples the text if that is ``self``; otherwise only used to check that it has embeddings for all tokens.
        progress: for ``self``, called with the number of blocks sampled so far and the total.

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
    """Choose at most ``chosen`` of ``count`` indices, evenly spaced, without repetition."""
    step = max(1.0, count / chosen)
    return (torch.arange(min(chosen, count)) * step + step / 2 - 0.5).round().long().clamp(max=count - 1).unique()


def _read_hub(text: str, *, characters: int) -> Iterator[str]:
    """Read documents from the start of a Hub data set until there are enough characters."""
    with hub_faults(text):
        for row in hub_stream(text):
            document = row["text"] or ""  # of a column that has nulls
            yield document
            characters -= len(document)
            if characters <= 0:
                return


def split(documents: list[str]) -> tuple[list[str], list[str]]:
    """Split documents into training and held-out text: the last 5 % of the characters, cutting a document if needed.

    Blank documents are dropped.
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
    """Whether a document is held out. This depends only on its text, so all copies are treated alike."""
    return zlib.crc32(document.encode(errors="replace")) % ONE_IN == 0


def part_of(document: str | None) -> Literal["train", "held out"] | None:
    """The part that a document belongs to by its checksum; None if it is blank."""
    if not document or not document.strip():
        return None
    return "held out" if is_held_out(document) else "train"


def split_by_checksum(documents: list[str]) -> tuple[list[str], list[str]]:
    """Split documents by checksum, so that the split does not depend on how much was read; drop blank ones."""
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
    """Pack documents into blocks of ``seq_len`` tokens, with the end-of-text token after each document.

    Reads and tokenises only what ``most`` blocks need, up to a batch of documents or a piece of one more.

    Raises:
        GossamerError: if there are not enough tokens for ``least`` blocks; the message begins with ``name``.
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
    """Sample text from the model at temperature 1; each block starts with the start-of-text token.

    An end-of-text token does not end a block; sampling continues after it. The model's own generation settings are
    ignored, and the global random state is preserved. ``progress`` is called after every batch with the number of
    blocks so far and the total.

    Raises:
        GossamerError: if the tokenizer has no token to start from, or the model has no embedding for it.
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
    """Context manager that disables the model's dropout and published generation settings.

    ``generate`` would otherwise apply those settings: an end token, penalties, suppressed tokens.
    """
    settings, training = model.generation_config, model.training
    model.generation_config = GenerationConfig()
    model.eval()
    try:
        yield
    finally:
        model.generation_config = settings
        model.train(training)
