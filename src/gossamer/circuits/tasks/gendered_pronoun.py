"""Gendered pronoun (Mathwin et al. 2023): a person's name decides between "he" and "she".

The corrupted prompt has a name of the other gender.
"""

import random
from collections.abc import Iterator

from transformers import PreTrainedTokenizerBase

from gossamer.circuits.tasks.base import Example, Task
from gossamer.circuits.tasks.words import FEMALE_NAMES, MALE_NAMES

TEMPLATES = (
    "{name} is a very good {role}, isn't",
    "Everyone knows that {name} is a careful {role}, isn't",
    "I think {name} is a famous {role}, isn't",
)
ROLES = ("artist", "cook", "dancer", "doctor", "driver", "friend", "lawyer", "leader", "neighbor", "singer", "teacher")


def _examples(source: random.Random, tokenizer: PreTrainedTokenizerBase, corruption: str) -> Iterator[Example]:
    kinds = ((MALE_NAMES, " he"), (FEMALE_NAMES, " she"))
    while True:
        template, role = source.choice(TEMPLATES), source.choice(ROLES)
        (names, pronoun), (other_names, other_pronoun) = source.sample(kinds, 2)
        clean, corrupted = (template.format(name=source.choice(own), role=role) for own in (names, other_names))
        yield Example(clean, corrupted, (pronoun,), (other_pronoun,))


GENDERED_PRONOUN = Task(
    "gendered-pronoun",
    "the pronoun that goes with a name",
    "logit_difference",
    ("other_name",),
    _examples,
)
