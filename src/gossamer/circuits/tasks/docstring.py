"""Docstring (Heimersheim and Janiak 2023): the next ``:param`` of a docstring is the next argument of the function.

The corrupted prompt has other arguments in the definition, so that the docstring no longer matches it. The wrong
answers are all argument names of both prompts except the right one.
"""

import random
from collections.abc import Iterator

from transformers import PreTrainedTokenizerBase

from gossamer.circuits.tasks.base import Example, Task
from gossamer.circuits.tasks.words import PLAIN_WORDS

FUNCTIONS = ("build", "check", "convert", "load", "merge", "parse", "read", "render", "send", "update")
ARGUMENTS = (
    "color", "data", "date", "default", "factor", "file", "format", "group", "host", "image", "index", "input", "key",
    "label", "length", "level", "limit", "line", "list", "mode", "model", "name", "node", "option", "order", "output",
    "path", "port", "prefix", "range", "result", "scale", "shape", "size", "source", "start", "state", "text", "title",
    "type", "user", "value", "width",
)  # fmt: skip


def _prompt(function: str, defined: list[str], documented: list[str], words: list[str]) -> str:
    lines = [
        f"    :param {name}: {first} {second}"
        for name, first, second in zip(documented, words[::2], words[1::2], strict=False)
    ]
    return (
        f'def {function}({", ".join(defined)}):\n    """{words[-1]} {words[-2]}\n\n' + "\n".join(lines) + "\n    :param"
    )


def _examples(source: random.Random, tokenizer: PreTrainedTokenizerBase, corruption: str) -> Iterator[Example]:
    while True:
        arguments = source.sample(ARGUMENTS, 10)
        before, documented, right, after, others = (
            arguments[:1], arguments[1:3], arguments[3], arguments[4:5], arguments[5:10],
        )  # fmt: skip
        words, function = source.sample(PLAIN_WORDS, 6), source.choice(FUNCTIONS)
        clean = _prompt(function, [*before, *documented, right, *after], documented, words)
        corrupted = _prompt(function, others, documented, words)
        wrong = tuple(f" {name}" for name in (*before, *documented, *after, *others))
        yield Example(clean, corrupted, (f" {right}",), wrong)


DOCSTRING = Task(
    "docstring",
    "the argument that a docstring names next",
    "logit_difference",
    ("other_definition",),
    _examples,
)
