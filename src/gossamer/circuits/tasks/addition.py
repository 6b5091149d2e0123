"""Two-digit addition, digit by digit: after ``37+58=0`` comes 9. Operands and answer are zero-padded.

The wrong answer is the digit of the corrupted sum at the same place. Corruptions: ``other_sum``, another sum with its
answer up to that place; ``carry``, a changed ones digit that flips the carry into the tens, where the tens digit is
asked for (sums whose hundreds digit depends on that carry are left out).

If the tokenizer can encode line breaks, solved sums of the same form precede the prompt. If it cannot, as the one of
``gossamer demo``, the prompt is the sum alone.
"""

import random
from collections.abc import Iterator

from transformers import PreTrainedTokenizerBase

from gossamer.circuits.tasks.base import Example, Task
from gossamer.errors import GossamerError

WORKED = ((12, 34), (58, 67), (29, 5), (81, 73), (46, 18))
"""Solved sums that precede the one asked for."""

PLACES = 3
"""Number of digits of an answer."""


def _text(a: int, b: int) -> str:
    return f"{a:02}+{b:02}={a + b:03}"


def _before(tokenizer: PreTrainedTokenizerBase) -> str:
    """Text before the sum; empty if the tokenizer cannot encode line breaks."""
    ids = tokenizer("1\n", add_special_tokens=False, verbose=False)["input_ids"]
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
        return ""
    return "".join(_text(a, b) + "\n" for a, b in WORKED)


def _other_sum(source: random.Random, a: int, b: int) -> tuple[int, int, int]:
    return source.randrange(100), source.randrange(100), source.randrange(PLACES)


def _other_carry(source: random.Random, a: int, b: int) -> tuple[int, int, int]:
    return a, b - b % 10 + source.randrange(10), 1


def _examples(source: random.Random, tokenizer: PreTrainedTokenizerBase, corruption: str) -> Iterator[Example]:
    before = _before(tokenizer)
    digits = tokenizer("0123456789", add_special_tokens=False, verbose=False)["input_ids"]
    if len(digits) != 10 or len(set(digits)) != 10:
        raise GossamerError("addition cannot be asked with this tokenizer: it does not write one token a digit")
    while True:
        a, b = source.randrange(100), source.randrange(100)
        c, d, place = {"other_sum": _other_sum, "carry": _other_carry}[corruption](source, a, b)
        clean, corrupted = _text(a, b), _text(c, d)
        end = len(clean) - PLACES + place
        if corruption == "carry":
            flipped = (a % 10 + b % 10 >= 10) != (c % 10 + d % 10 >= 10)
            if not flipped or clean[:end][-1] != corrupted[:end][-1]:
                continue
        if clean[end] != corrupted[end]:
            yield Example(before + clean[:end], before + corrupted[:end], (clean[end],), (corrupted[end],))


ADDITION = Task(
    "addition",
    "the next digit of the sum of two numbers",
    "logit_difference",
    ("other_sum", "carry"),
    _examples,
)
