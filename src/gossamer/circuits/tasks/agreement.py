"""Subject-verb agreement: the verb agrees with the subject, not with the noun closest to it.

The corrupted prompt has the subject in the other number. The task follows Linzen et al. (2016, arXiv 1611.01368).
"""

import random
from collections.abc import Iterator

from transformers import PreTrainedTokenizerBase

from gossamer.circuits.tasks.base import Example, Task

NOUNS = ("author", "boy", "brother", "cousin", "customer", "doctor", "farmer", "friend", "girl", "guard", "lawyer",
         "manager", "neighbor", "parent", "pilot", "player", "senator", "student", "teacher", "worker")  # fmt: skip
RELATIONS = ("behind", "beside", "in front of", "near", "next to", "across from")
SINGULAR = (" is", " was", " has")
PLURAL = (" are", " were", " have")


def _examples(source: random.Random, tokenizer: PreTrainedTokenizerBase, corruption: str) -> Iterator[Example]:
    while True:
        (subject, other), relation = source.sample(NOUNS, 2), source.choice(RELATIONS)
        endings = ["", "s"]
        source.shuffle(endings)
        other_ending = source.choice(endings)
        clean, corrupted = (f"The {subject}{ending} {relation} the {other}{other_ending}" for ending in endings)
        verbs = (PLURAL, SINGULAR) if endings[0] else (SINGULAR, PLURAL)
        yield Example(clean, corrupted, *verbs)


AGREEMENT = Task(
    "agreement",
    "the verb agrees with its subject, not with the nearest noun",
    "logit_difference",
    ("other_number",),
    _examples,
)
