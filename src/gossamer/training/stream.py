"""Token blocks of a text that is read during training, without loading all of it.

documents  ->  one in 20 held out, by the checksum of its text  ->  the rest dealt out to processes and their workers
           ->  tokens, joined by the end-of-text token  ->  blocks of exactly seq_len tokens, in the order of the text

Each process and worker reads its own files if their number divides the number of files, otherwise every n-th document.

Every batch carries the position at which the next one begins. This separates what was trained on from what was only
read ahead, so a resumed run continues at the next block without reading the text again.
"""

import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import IterableDataset as TextStream
from datasets import disable_progress_bars
from datasets.distributed import split_dataset_by_node
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gossamer.errors import GossamerError, one_line
from gossamer.models.vocabulary import require_vocabulary
from gossamer.names import SELF
from gossamer.training.data import ONE_IN, BlockCounts, Blocks, pack, part_of
from gossamer.training.data_sets import hub_faults, hub_stream
from gossamer.training.documents import is_local, read_documents, text_files
from gossamer.training.tokens import document_tokens


@dataclass(frozen=True)
class StreamPosition:
    """Position of a worker's next block in its part of the text.

    Attributes:
        documents: state of the document stream before the document in which the block begins; None at the start.
        tokens: number of that document's tokens before the block.
        rounds: number of times the part has been read to its end.
    """

    documents: dict[str, Any] | None = None
    tokens: int = 0
    rounds: int = 0


def open_stream(text: str) -> TextStream:
    """Open a stream of the documents of a text, under the key ``text``.

    Raises:
        GossamerError: if the text does not exist, or is ``self``.
    """
    if text == SELF:
        raise GossamerError("text 'self' is sampled before the training; --stream needs a text that exists")
    disable_progress_bars()
    if is_local(text):
        return TextStream.from_generator(_documents, gen_kwargs={"files": text_files(Path(text))})
    return hub_stream(text)


def _documents(files: list[Path]) -> Iterator[dict[str, str]]:
    for file in files:
        for document in read_documents(file):
            yield {"text": document}


def unseen_blocks(
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    counts: BlockCounts,
    *,
    model: PreTrainedModel | None = None,
) -> Blocks:
    """Read the first held-out blocks of a stream, for validation and metrics; the training part stays empty.

    If there are fewer than requested, validation gets at most a third. ``model``, if given, must have embeddings for
    all tokens of the tokenizer, since the rest of the text is unknown.

    Raises:
        GossamerError: naming the text, if it cannot be read, has fewer than two held-out blocks, or has only held-out
            documents.
    """
    if model is not None:
        require_vocabulary(model, tokenizer, text)
    parts: Counter[str] = Counter()

    def held_out() -> Iterator[str]:
        for row in open_stream(text):
            if (part := part_of(row["text"])) is not None:
                parts[part] += 1
            if part == "held out":
                yield row["text"]

    with _faults(text):
        documents = held_out()
        blocks = pack(
            documents, tokenizer, counts.seq_len, name=text, least=0, most=counts.validation + counts.held_out
        )
        while not parts["train"] and next(documents, None) is not None:
            pass
    if not parts:
        raise GossamerError(f"{text} is empty; give text to train on")
    if len(blocks) < 2 or not parts["train"]:
        found = "1 document" if parts.total() == 1 else f"{parts.total()} documents"
        lack = f"to hold out 2 blocks of {counts.seq_len} tokens" if len(blocks) < 2 else "to train on any"
        raise GossamerError(
            f"{text} is {found}, too few {lack}: --stream holds out whole ones, one in {ONE_IN}; leave --stream out, "
            "or give more documents (a .jsonl file has one a line)"
        )
    enough = len(blocks) == counts.validation + counts.held_out
    validation = counts.validation if enough else min(counts.validation, max(1, len(blocks) // 3))
    return Blocks(blocks[:0], blocks[:validation], blocks[validation:])


class BlockStream(IterableDataset[dict[str, Any]]):
    """One process's share of the training blocks of a stream; endless, the text repeats.

    Items are ``{"input_ids": [seq_len], "place": (slot, StreamPosition as a dict)}``, or ``{"fault": line}`` if the
    text cannot be read any further. A slot is one worker's part of the text.

    Args:
        text: the text, as for :func:`open_stream`.
        tokenizer: of the model.
        seq_len: tokens in a block.
        process: index of this process.
        processes: number of processes.
        workers: number of worker processes that read and tokenise; 0 to do so in this process.
        most: number of batches of the training, after which the stream ends; None for no end.
    """

    def __init__(
        self,
        text: str,
        tokenizer: PreTrainedTokenizerBase,
        seq_len: int,
        *,
        process: int = 0,
        processes: int = 1,
        workers: int = 0,
        most: int | None = None,
    ) -> None:
        self.text, self.tokenizer, self.seq_len = text, tokenizer, seq_len
        self.process, self.processes, self.workers = process, processes, workers
        self.most = most
        self.batches = 0
        self.places: dict[int, StreamPosition] = {}

    @property
    def slots(self) -> int:
        """Number of parts of this process's share."""
        return max(1, self.workers)

    def passed(self, place: tuple[int, dict[str, Any]]) -> None:
        """Record that the batch that carried ``place`` was trained on."""
        slot, fields = place
        self.batches += 1
        self.places[slot] = StreamPosition(**fields)

    @property
    def rounds(self) -> int:
        """Maximum number of times that a part of the text was read to its end."""
        return max((place.rounds for place in self.places.values()), default=0)

    def state_dict(self) -> dict[str, Any]:
        """The position for :meth:`load_state_dict`, made of numbers, strings, lists and dicts."""
        return {"batches": self.batches, "places": {str(slot): asdict(place) for slot, place in self.places.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the last batch that had been trained on when ``state`` was taken."""
        self.batches = state["batches"]
        self.places = {int(slot): StreamPosition(**place) for slot, place in state["places"].items()}

    def loader(self, batch_size: int) -> DataLoader[dict[str, Any]]:
        """Load batches ``{"input_ids": [batch, seq_len], "place": ...}`` from the current position on."""
        return DataLoader(self, batch_size=batch_size, num_workers=self.workers, collate_fn=_collate)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self.most is not None and self.batches >= self.most:
            return
        worker = get_worker_info()
        if worker is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
        # DataLoader takes batches from the workers in turn, starting with worker 0; so slots are shifted on resuming.
        slot = ((0 if worker is None else worker.id) + self.batches) % self.slots
        try:
            with _faults(self.text):
                for block, place in self._blocks(slot, self.places.get(slot, StreamPosition())):
                    yield {"input_ids": block, "place": (slot, asdict(place))}
        except (GossamerError, OSError) as error:
            yield {"fault": one_line(error)}

    def _blocks(self, slot: int, place: StreamPosition) -> Iterator[tuple[Int[Tensor, " tokens"], StreamPosition]]:
        part, parts = self.process * self.slots + slot, self.processes * self.slots
        while True:
            documents = split_dataset_by_node(open_stream(self.text), part, parts)
            found = False
            for block, following in _pack(_pieces(documents, self.tokenizer, place), self.seq_len, place.rounds):
                found = True
                yield block, following
            if not found and place.documents is None and place.tokens == 0:
                share = f" for part {part + 1} of {parts}; give more text or start fewer processes and workers"
                raise GossamerError(
                    f"{self.text} has fewer than {self.seq_len} tokens to train on{share if parts > 1 else ''}"
                )
            place = StreamPosition(rounds=place.rounds + 1)


def _faults(text: str) -> AbstractContextManager[None]:
    return nullcontext() if is_local(text) else hub_faults(text)


@dataclass(frozen=True)
class _Piece:
    """A part of one document's tokens.

    Attributes:
        documents: state of the stream before the document.
        start: number of the document's tokens before ``ids``.
        ids: the tokens.
        after: position of the next piece.
    """

    documents: dict[str, Any] | None
    start: int
    ids: list[int]
    after: tuple[dict[str, Any] | None, int]


def _pieces(documents: TextStream, tokenizer: PreTrainedTokenizerBase, place: StreamPosition) -> Iterator[_Piece]:
    """Tokenise the training documents from ``place`` on."""
    if place.documents is not None:
        documents.load_state_dict(place.documents)
    before, skipped = place.documents, place.tokens
    for row in documents.iter(1):
        (text,) = row["text"]
        after = documents.state_dict()
        if part_of(text) == "train":
            start, parts = 0, document_tokens(text, tokenizer)
            ids = next(parts, None)
            while ids is not None:
                following = next(parts, None)
                stop = start + len(ids)
                if stop > skipped:
                    rest = max(start, skipped)
                    yield _Piece(before, rest, ids[rest - start :], (after, 0) if following is None else (before, stop))
                start, ids = stop, following
            skipped = 0
        before = after


def _pack(
    pieces: Iterable[_Piece], seq_len: int, rounds: int
) -> Iterator[tuple[Int[Tensor, " tokens"], StreamPosition]]:
    """Pack pieces into blocks, each with the position of the next one."""
    waiting: deque[tuple[_Piece, int]] = deque()  # pieces, and the number of their tokens that are used
    count = 0
    for piece in pieces:
        waiting.append((piece, 0))
        count += len(piece.ids)
        while count >= seq_len:
            block: list[int] = []
            while len(block) < seq_len:
                taken, used = waiting.popleft()
                stop = used + seq_len - len(block)
                block += taken.ids[used:stop]
                if stop < len(taken.ids):
                    waiting.appendleft((taken, stop))
            count -= seq_len
            state, start = piece.after
            if waiting:
                following, used = waiting[0]
                state, start = following.documents, following.start + used
            yield torch.tensor(block), StreamPosition(state, start, rounds)


def _collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    for item in items:
        if "fault" in item:
            return item
    return {"input_ids": torch.stack([item["input_ids"] for item in items]), "place": items[-1]["place"]}
