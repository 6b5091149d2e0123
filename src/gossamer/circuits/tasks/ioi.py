"""Indirect object identification (Wang et al. 2022, arXiv 2211.00593).

Two people are somewhere, one of them (S, said twice) gives something to the other (IO, said once), whose name comes
next. Half of the prompts say IO first (ABBA), half S (BABA). Corruptions: ``abc``, all three names become other names;
``s2_io_flip``, the second S becomes IO; ``s2_third``, the second S becomes a third name.
"""

import random
from collections.abc import Iterator
from functools import partial

from transformers import PreTrainedTokenizerBase

from gossamer.circuits.tasks.base import Example, Task
from gossamer.circuits.tasks.words import NAMES, OBJECTS, PLACES

TEMPLATES = (
    "When {0} and {1} arrived at the {place}, {2} handed the {object} to",
    "After {0} and {1} had left the {place}, {2} passed the {object} to",
    "While {0} and {1} were waiting at the {place}, {2} showed the {object} to",
    "Yesterday {0} and {1} met near the {place}, and {2} lent the {object} to",
    "Because {0} and {1} were late for the {place}, {2} quickly gave the {object} to",
    "Then {0} and {1} walked past the {place}, where {2} offered the {object} to",
)


def _examples(
    source: random.Random,
    tokenizer: PreTrainedTokenizerBase,
    corruption: str,
    templates: tuple[str, ...] = TEMPLATES,
) -> Iterator[Example]:
    while True:
        template, place, thing = source.choice(templates), source.choice(PLACES), source.choice(OBJECTS)
        indirect, subject, *others = source.sample(NAMES, 5)
        first_two = [indirect, subject] if source.random() < 0.5 else [subject, indirect]
        corrupted = {
            "abc": others,
            "s2_io_flip": [*first_two, indirect],
            "s2_third": [*first_two, others[0]],
        }[corruption]
        clean_text, corrupted_text = (
            template.format(*names, place=place, object=thing) for names in ([*first_two, subject], corrupted)
        )
        yield Example(clean_text, corrupted_text, (f" {indirect}",), (f" {subject}",))


IOI = Task(
    "ioi",
    "who is given the thing: the name said once, not the one said twice",
    "logit_difference",
    ("abc", "s2_io_flip", "s2_third"),
    _examples,
    {
        "first": partial(_examples, templates=TEMPLATES[:3]),
        "second": partial(_examples, templates=TEMPLATES[3:]),
    },
)
