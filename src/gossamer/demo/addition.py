"""Two-digit addition as text, one token per character: all 10,000 sums such as ``37+58=095``, split by a seed.

Every pair of operands occurs once, so carries have their natural frequency: 45 % into the tens, 49.5 % into the
hundreds. Operands have two digits and answers three, zero-padded and most significant digit first, so that every sum
has nine tokens and each digit has a fixed position.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

CHARACTERS = "0123456789+="
PROMPT_TOKENS = 6
"""Tokens up to ``=``; the three digits of the answer follow."""

TOKENS = 9
PAIRS = 10_000

POSITIONS = (
    "the tens digit of a",
    "the ones digit of a",
    "+",
    "the tens digit of b",
    "the ones digit of b",
    "=",
    "the hundreds digit of the sum",
    "the tens digit of the sum",
    "the ones digit of the sum",
)
"""The meaning of each position of ``37+58=095``."""

ANSWERS = ("hundreds", "tens", "ones")
"""The digits of the answer in the order in which they are predicted, at positions 5, 6 and 7."""


@dataclass(frozen=True)
class Sums:
    """Pairs of operands, ``[sums]`` each, from 0 to 99."""

    a: Int[Tensor, " sums"]
    b: Int[Tensor, " sums"]

    def __len__(self) -> int:
        return len(self.a)

    def __getitem__(self, chosen: slice | Tensor) -> "Sums":
        return Sums(self.a[chosen], self.b[chosen])

    @property
    def carry_into_tens(self) -> Bool[Tensor, " sums"]:
        """Whether the ones digits add up to ten or more."""
        return self.a % 10 + self.b % 10 >= 10

    @property
    def carry_into_hundreds(self) -> Bool[Tensor, " sums"]:
        """Whether the sum is a hundred or more."""
        return self.a + self.b >= 100

    def texts(self) -> list[str]:
        """The sums as texts such as ``37+58=095``."""
        return [f"{a:02}+{b:02}={a + b:03}" for a, b in zip(self.a.tolist(), self.b.tolist(), strict=True)]

    def blocks(self) -> Int[Tensor, "sums 9"]:
        """The texts as token ids of :func:`addition_tokenizer`: each character's index in :data:`CHARACTERS`."""
        return torch.tensor([[CHARACTERS.index(character) for character in text] for text in self.texts()])


@dataclass(frozen=True)
class Split:
    """All pairs, each in one of three parts.

    Attributes:
        train: pairs to train on, dense and sparse.
        validation: unseen pairs that steer the multiplier.
        held_out: unseen pairs for the reported metrics.
    """

    train: Sums
    validation: Sums
    held_out: Sums


def split_pairs(*, validation: int, held_out: int, seed: int) -> Split:
    """Shuffle all 10,000 pairs by the seed and split them into held out, validation, and the rest for training."""
    order = torch.randperm(PAIRS, generator=torch.Generator().manual_seed(seed))
    pairs = Sums(order // 100, order % 100)
    return Split(
        train=pairs[held_out + validation :],
        validation=pairs[held_out : held_out + validation],
        held_out=pairs[:held_out],
    )


def addition_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per character, and one for all characters that do not occur in sums."""
    vocabulary = {character: place for place, character in enumerate(CHARACTERS)}
    backend = Tokenizer(models.WordLevel({**vocabulary, "<unk>": len(vocabulary)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", model_max_length=TOKENS)


@dataclass(frozen=True)
class IllustrativeSum:
    """An illustrative sum: its ``text``, and a ``note`` on what is special about it."""

    text: str
    note: str


def illustrative_sums(sums: Sums) -> list[IllustrativeSum]:
    """Up to eight of the sums that together cover every pattern of carries, in a fixed order."""
    tens, hundreds = sums.carry_into_tens, sums.carry_into_hundreds
    nine = sums.a // 10 + sums.b // 10 == 9
    kinds = {
        "no carry": ~tens & ~hundreds & ~nine,
        "a carry into the tens": tens & ~hundreds,
        "a carry into the hundreds": ~tens & hundreds,
        "carries into the tens and the hundreds": tens & hundreds & ~nine,
        "the tens digits make nine, and a carry runs through them into the hundreds": tens & nine,
        "the tens digits make nine, and no carry comes": ~tens & nine,
    }
    order = [(note, 0) for note in kinds] + [("no carry", 1), ("carries into the tens and the hundreds", 1)]
    found = []
    for note, place in order:
        at = kinds[note].nonzero().flatten()[place : place + 1]
        found += [IllustrativeSum(text, note) for text in sums[at].texts()]
    return found
