"""Tasks: pairs of prompts with the same number of tokens that differ in what decides the answer.

A task generates text, which is tokenized here. Answers are continuations of the prompt: the tokens of prompt + answer
must be those of the prompt plus one more. Everything is counted in tokens: answers with the same token count once, and
so do examples with the same tokens. An example that does not fit is dropped with a reason, and another one is drawn.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gossamer.errors import GossamerError
from gossamer.models.tokenizers import prompt_ids

MetricKind = Literal["logit_difference", "probability_difference"]

ATTEMPTS = 50
"""Maximum number of draws per requested example before an error is raised."""

IN_VAIN = 10_000
"""Maximum number of consecutive draws without a new example before an error is raised."""


@dataclass(frozen=True)
class Example:
    """One pair of prompts.

    Attributes:
        clean: the prompt.
        corrupted: the same prompt with what decides the answer changed.
        answers: right continuations of ``clean``.
        wrong: wrong continuations of ``clean``.
    """

    clean: str
    corrupted: str
    answers: tuple[str, ...]
    wrong: tuple[str, ...]


@dataclass(frozen=True)
class DroppedExample:
    """An example that was left out, and why."""

    example: Example
    reason: str


@dataclass(frozen=True)
class TokenizedExample:
    """A tokenized example.

    Attributes:
        clean, corrupted: ``[tokens]``, of equal length.
        answers, wrong: token ids of the continuations, without duplicates.
    """

    example: Example
    clean: Int[Tensor, " tokens"]
    corrupted: Int[Tensor, " tokens"]
    answers: Int[Tensor, " answers"]
    wrong: Int[Tensor, " wrong"]


@dataclass(frozen=True)
class Batch:
    """Examples of one length.

    Attributes:
        clean, corrupted: ``[prompts, tokens]``.
        answers, wrong: token ids of each prompt's continuations.
        metric: what is measured at the last position.
    """

    clean: Int[Tensor, "prompts tokens"]
    corrupted: Int[Tensor, "prompts tokens"]
    answers: tuple[Int[Tensor, " answers"], ...]
    wrong: tuple[Int[Tensor, " wrong"], ...]
    metric: MetricKind

    def measure(self, logits: Float[Tensor, "prompts vocab"]) -> Float[Tensor, " prompts"]:
        """Compute the task's metric for each prompt from the logits at the last position; differentiable.

        ``logit_difference``: mean logit of the answers minus that of the wrong ones. ``probability_difference``:
        the same difference of summed probabilities.
        """
        if self.metric == "logit_difference":
            rows = [row[a].mean() - row[w].mean() for row, a, w in zip(logits, self.answers, self.wrong, strict=True)]
        else:
            probabilities = torch.softmax(logits.float(), dim=-1)
            rows = [p[a].sum() - p[w].sum() for p, a, w in zip(probabilities, self.answers, self.wrong, strict=True)]
        return torch.stack(rows)

    def rows(self, some: slice) -> "Batch":
        """Some of the examples."""
        return Batch(self.clean[some], self.corrupted[some], self.answers[some], self.wrong[some], self.metric)


@dataclass(frozen=True)
class Prompts:
    """A task's examples for one tokenizer."""

    metric: MetricKind
    kept: tuple[TokenizedExample, ...]
    dropped: tuple[DroppedExample, ...]

    def batches(self, size: int) -> Iterator[Batch]:
        """Yield the examples in batches of equal length, in a fixed order."""
        ordered = sorted(self.kept, key=lambda tokens: len(tokens.clean))
        for _, same in groupby(ordered, key=lambda tokens: len(tokens.clean)):
            group = list(same)
            for start in range(0, len(group), size):
                part = group[start : start + size]
                yield Batch(
                    torch.stack([tokens.clean for tokens in part]),
                    torch.stack([tokens.corrupted for tokens in part]),
                    tuple(tokens.answers for tokens in part),
                    tuple(tokens.wrong for tokens in part),
                    self.metric,
                )


Examples = Callable[[random.Random, PreTrainedTokenizerBase, str], Iterator[Example]]
"""Generates examples from a random source, for a tokenizer and a corruption."""


@dataclass(frozen=True)
class Task:
    """A task: how to generate examples.

    Attributes:
        name: name on the command line.
        summary: one-line description.
        metric: what is measured.
        corruptions: names that ``examples`` understands, the default first.
        examples: generates the examples.
        phrasings: other sets of templates by name, to see whether a circuit depends on the wording.
        file_checksum: checksum of the examples if they come from a file; another file may have the same name.
    """

    name: str
    summary: str
    metric: MetricKind
    corruptions: tuple[str, ...]
    examples: Examples
    phrasings: Mapping[str, Examples] = field(default_factory=dict)
    file_checksum: int | None = None

    def prompts(
        self,
        tokenizer: PreTrainedTokenizerBase,
        count: int,
        *,
        seed: int = 0,
        corruption: str | None = None,
        phrasing: str | None = None,
    ) -> Prompts:
        """Generate ``count`` examples that differ in their tokens.

        Raises:
            GossamerError: on an unknown corruption or phrasing; if the tokenizer leaves too few examples.
        """
        corruption = corruption or self.corruptions[0]
        if corruption not in self.corruptions:
            raise GossamerError(
                f"task {self.name} has no corruption {corruption!r}; there are {', '.join(self.corruptions)}"
            )
        kept: list[TokenizedExample] = []
        dropped: list[DroppedExample] = []
        seen: set[object] = set()
        if phrasing is not None and phrasing not in self.phrasings:
            known = ", ".join(self.phrasings) or "none"
            raise GossamerError(f"task {self.name} has no phrasing {phrasing!r}; there are {known}")
        make = self.examples if phrasing is None else self.phrasings[phrasing]
        source = make(random.Random(seed), tokenizer, corruption)
        in_vain = 0
        for _, example in zip(range(ATTEMPTS * count), source, strict=False):
            in_vain += 1
            if in_vain > IN_VAIN:
                break
            if example in seen:
                continue
            seen.add(example)
            tokens = tokenize(example, tokenizer)
            if isinstance(tokens, DroppedExample):
                dropped.append(tokens)
            elif (measured := _measured(tokens)) not in seen:
                seen.add(measured)
                kept.append(tokens)
                in_vain = 0
            if len(kept) == count:
                return Prompts(self.metric, tuple(kept), tuple(dropped))
        raise GossamerError(
            f"task {self.name} gives only {len(kept)} of {count} examples with this tokenizer; {_most_common(dropped)}"
        )


def tokenize(example: Example, tokenizer: PreTrainedTokenizerBase) -> TokenizedExample | DroppedExample:
    """Tokenize an example, or return why it cannot be used."""
    clean, corrupted = (prompt_ids(tokenizer, text) for text in (example.clean, example.corrupted))
    if not clean or not corrupted:
        return DroppedExample(example, f"the {'corrupted' if clean else 'clean'} prompt has no token")
    if len(clean) != len(corrupted):
        return DroppedExample(example, f"the clean prompt has {len(clean)} tokens, the corrupted one {len(corrupted)}")
    continuations: dict[str, list[int]] = {}
    for kind, texts in (("answers", example.answers), ("wrong", example.wrong)):
        found = next_tokens(example.clean, texts, tokenizer)
        for text in texts:
            if text not in found:
                return DroppedExample(example, f"{text!r} does not continue the prompt by exactly one token")
        continuations[kind] = list(dict.fromkeys(found[text] for text in texts))
    if not continuations["answers"] or not continuations["wrong"]:
        return DroppedExample(
            example, "there is no right answer" if continuations["wrong"] else "there is no wrong answer"
        )
    if set(continuations["answers"]) & set(continuations["wrong"]):
        return DroppedExample(example, "the same token is right and wrong")
    parts = (clean, corrupted, continuations["answers"], continuations["wrong"])
    return TokenizedExample(example, *(torch.tensor(part) for part in parts))


def next_tokens(prompt: str, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Map each text that continues the prompt by exactly one token to that token."""
    ids = prompt_ids(tokenizer, prompt)
    wholes = {text: prompt_ids(tokenizer, prompt + text) for text in texts}
    return {text: whole[-1] for text, whole in wholes.items() if whole[:-1] == ids}


def _measured(tokens: TokenizedExample) -> tuple[tuple[int, ...], ...]:
    """Key of what a model sees of an example: prompts, answers and wrong answers as tokens."""
    parts = tokens.clean, tokens.corrupted, tokens.answers.sort().values, tokens.wrong.sort().values
    return tuple(tuple(part.tolist()) for part in parts)


def _most_common(dropped: Sequence[DroppedExample]) -> str:
    if not dropped:
        return "there are no more different ones"
    reason, times = Counter(each.reason for each in dropped).most_common(1)[0]
    return f"{len(dropped)} were dropped, {times} of them because {reason}"
