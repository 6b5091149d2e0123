"""Two-digit addition as text, one token a character: all 10,000 sums ``37+58=095``, split by a seed.

Every pair of operands occurs once, so carries are as frequent as they naturally are: 45 % into the tens, 49.5 % into
the hundreds. Operands have two digits and the answer three, zeros in front, the most significant digit first: all sums
have nine tokens, and each digit always stands in the same place.
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
"""What stands at each position of ``37+58=095``."""

ANSWERS = ("hundreds", "tens", "ones")
"""The digits of the answer in the order in which they are decided, at positions 5, 6 and 7."""


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
        """Whether the ones digits make ten or more."""
        return self.a % 10 + self.b % 10 >= 10

    @property
    def carry_into_hundreds(self) -> Bool[Tensor, " sums"]:
        """Whether the whole makes a hundred or more."""
        return self.a + self.b >= 100

    def texts(self) -> list[str]:
        """``37+58=095``."""
        return [f"{a:02}+{b:02}={a + b:03}" for a, b in zip(self.a.tolist(), self.b.tolist(), strict=True)]

    def blocks(self) -> Int[Tensor, "sums 9"]:
        """The texts in the tokens of :func:`addition_tokenizer`: the character's place in :data:`CHARACTERS`."""
        return torch.tensor([[CHARACTERS.index(character) for character in text] for text in self.texts()])


@dataclass(frozen=True)
class Split:
    """All pairs, each in one of the three parts.

    Attributes:
        train: to train on, dense and sparse.
        validation: unseen; the multiplier is steered by them.
        held_out: unseen; metrics are reported on them.
    """

    train: Sums
    validation: Sums
    held_out: Sums


def split_pairs(*, validation: int, held_out: int, seed: int) -> Split:
    """All 10,000 pairs in an order decided by the seed: held out, validation, and the rest to train on."""
    order = torch.randperm(PAIRS, generator=torch.Generator().manual_seed(seed))
    pairs = Sums(order // 100, order % 100)
    return Split(
        train=pairs[held_out + validation :],
        validation=pairs[held_out : held_out + validation],
        held_out=pairs[:held_out],
    )


def addition_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, and one for every character that no sum has."""
    vocabulary = {character: place for place, character in enumerate(CHARACTERS)}
    backend = Tokenizer(models.WordLevel({**vocabulary, "<unk>": len(vocabulary)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", model_max_length=TOKENS)


@dataclass(frozen=True)
class IllustrativeSum:
    """A sum worth looking at: its ``text`` and what is special about it."""

    text: str
    note: str


def illustrative_sums(sums: Sums) -> list[IllustrativeSum]:
    """Up to eight of the sums that between them show every way a carry can go, in a fixed order."""
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
