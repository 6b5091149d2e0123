"""Measure what each open link of an addition model does, and describe it in words.

Links are analysed in groups: all links of one layer from one key to one query, over all heads. For each group, measure

1. the share of the sums in which one of its links is open, with and without a carry into the tens or the hundreds;
2. the effect of cutting it: run the model with the links carrying nothing, and score each digit of the answer;
3. what it passes on, by interchange: replace the links' messages A_ij P_ij v_j by those of another sum, drawn at random
   among the sums that agree in one quantity (a digit, a carry, a digit of the answer ...) and in the token at the
   query, which the query knows anyway. If nearly as many sums stay correct as before, the model uses only that quantity
   of the message (interchange interventions of Geiger et al. 2021, arXiv 2106.02997, resampled as in causal scrubbing).
   Quantities are tried in ascending order of their number of values, starting with none, and the first sufficient one
   is named. Only sums that received another sum's message count.

All links of one query are also cut together. The sentences are made from these numbers alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from gossamer.circuits.activation_cache import ActivationCache, run_with_cache
from gossamer.circuits.intervention import run_with_interchange, run_without_links
from gossamer.demo.addition import ANSWERS, CHARACTERS, POSITIONS, PROMPT_TOKENS, Sums

Link = tuple[int, int, int, int]
"""Layer, head, query position, key position."""

ENOUGH = 0.01
"""Share of the sums in which a link has to be open to be reported."""

TOLERANCE = 0.01
"""Share of the sums that may become wrong under an exchange that still counts as harmless."""

TELLING = 0.1
"""Smallest difference between sums with and without a carry for which a sentence distinguishes them."""

FEWEST = 200
"""Smallest number of sums that have to receive another sum's message for an exchange to count."""

NOTHING = "nothing"
"""The constant quantity, in which all sums agree."""


@dataclass(frozen=True)
class Accuracy:
    """Shares of sums answered correctly by greedy decoding.

    Attributes:
        exact: all three digits correct.
        digits: each digit, given the correct digits before it, by the names of :data:`ANSWERS`.
        groups: ``exact`` within each group of :func:`groups_of`.
    """

    exact: float
    digits: dict[str, float]
    groups: dict[str, float]


def groups_of(sums: Sums) -> dict[str, Bool[Tensor, " sums"]]:
    """The sums with and without each carry."""
    groups = {}
    for place, carry in (("tens", sums.carry_into_tens), ("hundreds", sums.carry_into_hundreds)):
        groups[f"with a carry into the {place}"] = carry
        groups[f"without a carry into the {place}"] = ~carry
    return groups


def quantities_of(sums: Sums) -> dict[str, Int[Tensor, " sums"]]:
    """The quantities that a link could pass on, by name, those with fewest values first."""
    a_tens, a_ones, b_tens, b_ones = sums.a // 10, sums.a % 10, sums.b // 10, sums.b % 10
    total = sums.a + sums.b
    return {
        NOTHING: torch.zeros_like(total),
        "the carry into the tens": sums.carry_into_tens.long(),
        "the carry into the hundreds": sums.carry_into_hundreds.long(),
        "the tens digit of a": a_tens,
        "the ones digit of a": a_ones,
        "the tens digit of b": b_tens,
        "the ones digit of b": b_ones,
        "the tens digit of the sum": total // 10 % 10,
        "the ones digit of the sum": total % 10,
        "the sum of the ones digits": a_ones + b_ones,
        "the sum of the tens digits": a_tens + b_tens,
        "the hundreds and the tens digit of the sum": total // 10,
        "both ones digits": 10 * a_ones + b_ones,
        "both tens digits": 10 * a_tens + b_tens,
    }


def measure_accuracy(logits: Float[Tensor, "sums 9 vocab"], sums: Sums) -> Accuracy:
    """Compute accuracy from the logits on the whole sums.

    A greedily decoded answer is correct if and only if every digit is the most likely one after the correct digits
    before it, so one forward pass over the whole sum is enough.
    """
    right = logits[:, PROMPT_TOKENS - 1 : -1].argmax(-1).cpu() == sums.blocks()[:, PROMPT_TOKENS:]
    exact = right.all(1)
    digits = dict(zip(ANSWERS, right.double().mean(0).tolist(), strict=True))
    groups = {name: exact[chosen].double().mean().item() for name, chosen in groups_of(sums).items()}
    return Accuracy(exact.double().mean().item(), digits, groups)


@torch.no_grad()
def model_accuracy(model: PreTrainedModel, sums: Sums) -> Accuracy:
    """Measure the accuracy of a model, with hard gates if it is gated; leaves the model in ``eval()`` mode."""
    model.eval()
    return measure_accuracy(model(input_ids=sums.blocks().to(model.device), use_cache=False).logits, sums)


@dataclass(frozen=True)
class OpenLink:
    """A link and how often it is open.

    Attributes:
        link: layer, head, query position, key position.
        open: share of all sums in which it is open.
        groups: the same share within each group of :func:`groups_of`.
    """

    link: Link
    open: float
    groups: dict[str, float]


@dataclass(frozen=True)
class LinkMap:
    """The open links of a model on some sums.

    Attributes:
        links: those open in at least :data:`ENOUGH` of the sums, sorted by layer, query, key and head.
        mean: mean number of open links per sum.
        most: largest number of open links of any sum.
        union: number of distinct links that are open in at least one sum.
    """

    links: tuple[OpenLink, ...]
    mean: float
    most: int
    union: int


class Measurements:
    """Measures a gated model on sums that it has never seen: open links, and effects of interventions.

    Args:
        model: gated, in ``eval()`` mode.
        sums: what to measure on.
        seed: of the exchanges.
    """

    def __init__(self, model: PreTrainedModel, sums: Sums, *, seed: int = 0) -> None:
        self.model, self.sums = model, sums
        self.blocks = sums.blocks().to(model.device)
        self.recording: ActivationCache = run_with_cache(model, self.blocks, links=True)
        self.opened = torch.stack([weights > 0 for weights in self.recording.weights], 1).cpu()
        self.groups = groups_of(sums)
        self.generator = torch.Generator().manual_seed(seed)
        self.whole = model_accuracy(model, sums)

    def mask(self, links: Sequence[Link]) -> Bool[Tensor, "layers heads tokens tokens"]:
        """True at the links."""
        mask = torch.zeros(self.opened.shape[1:], dtype=torch.bool)
        for link in links:
            mask[link] = True
        return mask

    def opening(self, links: Sequence[Link]) -> tuple[float, dict[str, float]]:
        """The share of the sums in which at least one of the links is open: among all sums, and in each group."""
        any_open = (self.opened & self.mask(links)).flatten(1).any(1).double()
        return any_open.mean().item(), {name: any_open[chosen].mean().item() for name, chosen in self.groups.items()}

    def map(self) -> LinkMap:
        """Find the open links."""
        places = (self.opened.double().mean(0) >= ENOUGH).nonzero().tolist()
        places.sort(key=lambda place: (place[0], place[2], place[3], place[1]))
        links = [(layer, head, query, key) for layer, head, query, key in places]
        count = self.opened.flatten(1).sum(1)
        return LinkMap(
            tuple(OpenLink(link, *self.opening([link])) for link in links),
            count.double().mean().item(),
            int(count.max()),
            int(self.opened.any(0).sum()),
        )

    def cut(self, links: Sequence[Link]) -> Accuracy:
        """Measure accuracy with the links carrying nothing."""
        return measure_accuracy(run_without_links(self.model, self.blocks, self.mask(links)), self.sums)

    def exchanged(self, links: Sequence[Link], values: Int[Tensor, " sums"]) -> float | None:
        """Measure exact match when the links carry what they carry in another sum, random among equal ``values``.

        Only sums that received another sum's message count; None if they are fewer than :data:`FEWEST`.
        """
        donors = sample_donors(values, self.generator)
        moved = (donors != torch.arange(len(donors))).nonzero().flatten()
        if len(moved) < FEWEST:
            return None
        logits = run_with_interchange(self.model, self.blocks, self.mask(links), self.recording, donors)
        return measure_accuracy(logits[moved], self.sums[moved]).exact

    def passed_on(self, links: Sequence[Link]) -> tuple[str | None, dict[str, float]]:
        """Find the first quantity within which exchange is harmless, and the exact match for each quantity tried.

        Args:
            links: links of one query.
        """
        tried: dict[str, float] = {}
        known = self.blocks[:, links[0][2]].cpu()
        for name, values in quantities_of(self.sums).items():
            exact = self.exchanged(links, values * len(CHARACTERS) + known)
            if exact is None:
                continue
            tried[name] = exact
            if exact >= self.whole.exact - TOLERANCE:
                return name, tried
        return None, tried


def sample_donors(values: Int[Tensor, " sums"], generator: torch.Generator) -> Int[Tensor, " sums"]:
    """Draw for each sum another one with the same value; a sum whose value is unique gets itself.

    Sums of the same value are shuffled and each gets the next one, so that none of several gets itself.
    """
    shuffled = torch.randperm(len(values), generator=generator)
    ordered = shuffled[torch.argsort(values[shuffled], stable=True)]
    donors = torch.empty_like(ordered)
    for members in torch.split(ordered, torch.unique(values, return_counts=True)[1].tolist()):
        donors[members] = members.roll(1)
    return donors


def describe(model: PreTrainedModel, sums: Sums, *, measured: int = 2_000, seed: int = 0) -> dict[str, Any]:
    """Make the contents of ``findings.json``, whose keys ``docs/metrics.md`` documents.

    Args:
        model: gated, in ``eval()`` mode.
        sums: sums not seen in training; accuracy and open links are measured on all of them.
        measured: number of these sums on which interventions are run.
        seed: of the exchanges.
    """
    found, whole = Measurements(model, sums).map(), model_accuracy(model, sums)
    some = Measurements(model, sums[:measured], seed=seed)
    groups = [measure_group(some, group) for group in by_query_and_key(found.links)]
    sentences = [_summary(found, whole, len(sums)), *_ways(groups), *map(_about_group, groups)]
    for query in sorted({each.link[2] for each in found.links}):
        group = [each for each in found.links if each.link[2] == query]
        if len({(each.link[0], each.link[3]) for each in group}) > 1:
            sentences.append(_about_query(some, group))
    return {
        "title": "Two-digit addition, link by link",
        "sentences": sentences,
        "positions": list(POSITIONS),
        "sums": len(sums),
        "sums_of_interventions": len(some.sums),
        "accuracy": asdict(whole),
        "links": [asdict(each) for each in found.links],
        "open_links_mean": found.mean,
        "open_links_most": found.most,
        "open_links_union": found.union,
    }


def by_query_and_key(links: Sequence[OpenLink]) -> list[list[OpenLink]]:
    """Group links by layer, query and key, ordered by the first link of each group."""
    groups: dict[tuple[int, int, int], list[OpenLink]] = {}
    for each in links:
        layer, _, query, key = each.link
        groups.setdefault((layer, query, key), []).append(each)
    return list(groups.values())


def _percent(share: float) -> str:
    """Format a share; only exact 0 and 1 are written as 0 % and 100 %."""
    if share in (0.0, 1.0):
        return f"{100 * share:.0f} %"
    return f"{min(max(100 * share, 0.1), 99.9):.1f} %"


def _thing(position: int) -> str:
    name = POSITIONS[position]
    return f"'{name}'" if len(name) == 1 else name


def _reader(position: int) -> str:
    """Describe a query position: its token, and the digit predicted there."""
    place = position - (PROMPT_TOKENS - 1)
    if 0 <= place < len(ANSWERS):
        return f"the {ANSWERS[place]} digit of the sum, decided at {_thing(position)},"
    return _thing(position)


def _by_carry(groups: Mapping[str, float]) -> str:
    """The shares with and without the carry that matters more, in parentheses; empty if neither carry matters."""
    pairs = [(groups[f"with a carry into the {place}"], groups[f"without a carry into the {place}"], place)
             for place in ("tens", "hundreds")]  # fmt: skip
    with_carry, without, place = max(pairs, key=lambda pair: abs(pair[0] - pair[1]))
    if not abs(with_carry - without) >= TELLING:
        return ""
    return f" ({_percent(with_carry)} with a carry into the {place}, {_percent(without)} without)"


def _harms(cut: Accuracy, whole: Accuracy) -> list[str]:
    """The digits of the answer that a cut harms."""
    return [name for name, share in cut.digits.items() if whole.digits[name] - share > TOLERANCE]


def _damage(cut: Accuracy, whole: Accuracy) -> str:
    """Describe the effect of a cut in words derived from the numbers."""
    stay = f"{_percent(cut.exact)} of the sums stay right{_by_carry(cut.groups)}"
    hit = _harms(cut, whole)
    if not hit:
        return f"changes next to nothing: {stay}"
    digits = " and ".join(f"the {name} digit ({_percent(cut.digits[name])} right)" for name in hit)
    return f"harms {digits}{' alone' if len(hit) == 1 else ''}: {stay}"


def _cut_evidence(cut: Accuracy, whole: Accuracy) -> dict[str, float]:
    return {
        "exact match": whole.exact,
        "exact match, cut": cut.exact,
        **{f"{name} digit right, cut": share for name, share in cut.digits.items()},
        **{f"exact match {name}, cut": share for name, share in cut.groups.items()},
    }


def _sentence(text: str, group: Sequence[OpenLink], evidence: dict[str, float]) -> dict[str, Any]:
    return {"text": text, "links": [list(each.link) for each in group], "evidence": evidence}


def _summary(found: LinkMap, whole: Accuracy, sums: int) -> dict[str, Any]:
    text = (
        f"With {found.mean:.1f} open links on average and {found.most} at most the model gets {_percent(whole.exact)} "
        f"of {sums:,} sums right that it has never seen; {found.union} different links are open in any of them, "
        f"{len(found.links)} in at least {_percent(ENOUGH)}."
    )
    evidence = {
        "open links, mean": found.mean,
        "open links, most": found.most,
        "open links, union": found.union,
        "exact match": whole.exact,
    }
    return _sentence(text, found.links, evidence)


@dataclass(frozen=True)
class MeasuredGroup:
    """The links of one layer, query and key, with their measurements.

    Attributes:
        links: of the group.
        open: share of the sums in which at least one of them is open; ``open_groups``: the same by group of sums.
        whole, cut: accuracy of the unmodified model, and with the links carrying nothing.
        quantity: the first quantity within which exchange is harmless, or None.
        tried: exact match under exchange, by quantity.
    """

    links: tuple[OpenLink, ...]
    open: float
    open_groups: dict[str, float]
    whole: Accuracy
    cut: Accuracy
    quantity: str | None
    tried: dict[str, float]

    @property
    def reading(self) -> str:
        """Query and key in words."""
        _, _, query, key = self.links[0].link
        return f"{_reader(query)} reads {_thing(key)}"

    @property
    def place(self) -> str:
        """Layer, heads, query and key in words."""
        heads = " or ".join(str(each.link[1]) for each in self.links)
        return f"layer {self.links[0].link[0]}, head {heads}: {self.reading}"


def measure_group(some: Measurements, group: Sequence[OpenLink]) -> MeasuredGroup:
    """Measure the links of one layer, query and key: how often they are open, and the effects of cut and exchange."""
    links = [each.link for each in group]
    return MeasuredGroup(tuple(group), *some.opening(links), some.whole, some.cut(links), *some.passed_on(links))


def _about_group(group: MeasuredGroup) -> dict[str, Any]:
    evidence: dict[str, float] = {f"head {each.link[1]} open": each.open for each in group.links}
    evidence |= {"open": group.open, **{f"open {name}": value for name, value in group.open_groups.items()}}
    evidence |= _cut_evidence(group.cut, group.whole)
    evidence |= {f"exact match, exchanged among equals in {name}": value for name, value in group.tried.items()}
    text = (
        f"{group.place[0].upper()}{group.place[1:]}, in {_percent(group.open)} of the sums"
        f"{_by_carry(group.open_groups)}. Cutting this {_damage(group.cut, group.whole)}. "
        f"{_exchange(group.quantity, group.tried)}"
    )
    return _sentence(text, group.links, evidence)


def _ways(groups: Sequence[MeasuredGroup]) -> list[dict[str, Any]]:
    """Describe which links pass on each carry, and which links read digits unchanged.

    Links that can be cut without harm do not contribute to the addition and are omitted.
    """
    kinds = {
        "The carry into the tens is passed on where": {"the carry into the tens"},
        "The carry into the hundreds is passed on where": {"the carry into the hundreds"},
        "Digits are read as they are where": {f"the {place} digit of {x}" for place in ("tens", "ones") for x in "ab"},
    }
    sentences = []
    for opening, quantities in kinds.items():
        along = [group for group in groups if group.quantity in quantities and _harms(group.cut, group.whole)]
        if along:
            text = f"{opening} {'; '.join(f'{group.reading} (layer {group.links[0].link[0]})' for group in along)}."
            evidence = {f"exact match, cut: {group.place}": group.cut.exact for group in along}
            sentences.append(_sentence(text, [each for group in along for each in group.links], evidence))
    return sentences


def _exchange(quantity: str | None, tried: Mapping[str, float]) -> str:
    if not tried:
        return "What it passes on is not known: the sums are too few to exchange it among equals."
    if quantity is None:
        best = max(tried, key=lambda name: tried[name])
        return (
            "What it passes on is more than any one quantity that was tried: exchanged among sums that agree in "
            f"{best}, {_percent(tried[best])} stay right."
        )
    kept = f"{_percent(tried[quantity])} stay right"
    if quantity == NOTHING:
        return f"It passes on nothing about the sum: exchanged with that of any other one, {kept}."
    return (
        f"What it passes on is {quantity}: exchanged among sums that agree in that, {kept}; "
        f"among all, {_percent(tried[NOTHING])}."
    )


def _about_query(some: Measurements, group: Sequence[OpenLink]) -> dict[str, Any]:
    query = group[0].link[2]
    cut = some.cut([each.link for each in group])
    text = f"Cutting all that {_reader(query)} reads {_damage(cut, some.whole)}."
    return _sentence(text, group, _cut_evidence(cut, some.whole))
