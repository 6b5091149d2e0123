"""Indirect object identification (Wang et al. 2022, arXiv 2211.00593).

Two people are at a place. One of them (S, named twice) gives something to the other (IO, named once), whose name comes
next. Half of the prompts name IO first (ABBA), half S (BABA). Corruptions: ``abc``, all three names become other names;
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

OTHER_TEMPLATES = {
    "afterwards": (
        "{0} and {1} spent the afternoon together, and on the way to the {place} {2} sold the {object} to",
        "The {place} was empty when {0} and {1} came in, so {2} brought the {object} to",
        "Once {0} and {1} had talked about the {place}, {2} sent the {object} to",
    ),
    "reported": (
        "Everyone at the {place} knew {0} and {1}. In the end {2} returned the {object} to",
        "My friends {0} and {1} live next to the {place}. Last week {2} gave the {object} to",
        "It was raining, and {0} and {1} stayed at the {place}. Before lunch {2} threw the {object} to",
    ),
}
"""Other wordings; none of them is in :data:`TEMPLATES`."""


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
    {name: partial(_examples, templates=templates) for name, templates in OTHER_TEMPLATES.items()},
)
