"""Induction: copy the last word of a repeated list of words (Olsson et al. 2022, arXiv 2209.11895).

The corrupted prompt has another last word in the first list.
"""

import random
from collections.abc import Iterator

from transformers import PreTrainedTokenizerBase

from gossamer.circuits.tasks.base import Example, Task
from gossamer.circuits.tasks.words import PLAIN_WORDS

LENGTH = 8
"""Number of words in the list."""


def _examples(source: random.Random, tokenizer: PreTrainedTokenizerBase, corruption: str) -> Iterator[Example]:
    while True:
        *words, right, other, between = source.sample(PLAIN_WORDS, LENGTH + 2)
        clean, corrupted = (" ".join((*words, last, between, *words)) for last in (right, other))
        yield Example(clean, corrupted, (f" {right}",), (f" {other}",))


INDUCTION = Task(
    "induction",
    "the last word of a list that is said again",
    "logit_difference",
    ("other_word",),
    _examples,
)
