"""Greater-than (Hanna et al. 2023, arXiv 2305.00586): a war that began in 1732 ends in a later year of the century.

In the corrupted prompt the war begins in year 01, so that every later year is right. Tokenizers split years
differently; the form is found by trial:

- two digits per token (GPT-2, for some years): the next token is the year of the century, right if it is greater;
- one digit per token (SmolLM2, Qwen, Gemma): the next token is the tens digit, right if it is greater than the first
  year's, wrong if smaller; an equal digit does not count, since the ones digit would decide;
- three digits, then one (Llama 3): the next token is century and tens digit, with the same rule.
"""

import random
from collections.abc import Iterator
from functools import partial

from transformers import PreTrainedTokenizerBase

from gossamer.circuits.tasks.base import Example, Task, next_tokens
from gossamer.errors import GossamerError

NOUNS = (
    "affair", "agreement", "alliance", "apprenticeship", "argument", "battle", "blockade", "bombardment", "boom",
    "boycott", "campaign", "ceremony", "coalition", "colony", "competition", "confinement", "conflict",
    "confrontation", "congress", "construction", "contest", "contract", "controversy", "cooperation", "correspondence",
    "council", "courtship", "crackdown", "crisis", "crusade", "custom", "debate", "decline", "deployment", "detention",
    "dictatorship", "discussion", "dispute", "drought", "dynasty", "effort", "embargo", "emergency", "empire",
    "engagement", "epidemic", "era", "escalation", "excavation", "exile", "expedition", "experiment", "exploration",
    "famine", "fashion", "festival", "feud", "flood", "friendship", "harvest", "hostility", "hunt", "insurgency",
    "interregnum", "intervention", "invasion", "investigation", "journey", "lawsuit", "lease", "march", "marriage",
    "migration", "mission", "monopoly", "mutiny", "negotiation", "occupation", "operation", "partnership", "peace",
    "persecution", "pilgrimage", "plague", "project", "prosperity", "protest", "pursuit", "quarrel", "rebellion",
    "reconstruction", "reform", "regency", "reign", "renovation", "residency", "restoration", "retreat", "revolt",
    "revolution", "rivalry", "schism", "search", "shortage", "siege", "slump", "strike", "struggle", "surveillance",
    "survey", "tenure", "tournament", "tradition", "treaty", "trial", "truce", "uprising", "vogue", "voyage", "war",
)  # fmt: skip
CENTURIES = range(11, 18)
YEARS = range(2, 99)


def _years(form: str, century: int) -> list[str]:
    """Possible next texts, in ascending order."""
    return {
        "years": [f"{year:02}" for year in range(100)],
        "tens": [str(tens) for tens in range(10)],
        "century and tens": [f"{century}{tens}" for tens in range(10)],
    }[form]


LASTED = "The {noun} lasted from the year {start} to the year {end}"
BEGAN = "The {noun} that began in the year {start} came to its end in the year {end}"


def _prompt(template: str, form: str, noun: str, century: int, year: int) -> str:
    end = "" if form == "century and tens" else str(century)
    return template.format(noun=noun, start=f"{century}{year:02}", end=end)


def _form(tokenizer: PreTrainedTokenizerBase) -> str:
    for form in ("years", "tens", "century and tens"):
        for century in CENTURIES:
            options = _years(form, century)
            found = next_tokens(_prompt(LASTED, form, "war", century, 32), options, tokenizer)
            if len(set(found.values())) > len(options) // 2:
                return form
    raise GossamerError(
        "greater-than cannot be asked with this tokenizer: it writes no year in tokens of one to three digits"
    )


def _examples(
    source: random.Random, tokenizer: PreTrainedTokenizerBase, corruption: str, template: str = LASTED
) -> Iterator[Example]:
    form = _form(tokenizer)
    while True:
        noun, century, year = source.choice(NOUNS), source.choice(CENTURIES), source.choice(YEARS)
        clean, corrupted = (_prompt(template, form, noun, century, y) for y in (year, 1))
        own = year if form == "years" else year // 10
        options = _years(form, century)
        possible = next_tokens(clean, options, tokenizer)
        right = tuple(text for text in options[own + 1 :] if text in possible)
        wrong = tuple(text for text in options[: own + 1 if form == "years" else own] if text in possible)
        yield Example(clean, corrupted, right, wrong)


GREATER_THAN = Task(
    "greater-than",
    "a span of years ends after it began",
    "probability_difference",
    ("first_year",),
    _examples,
    {"began": partial(_examples, template=BEGAN)},
)
