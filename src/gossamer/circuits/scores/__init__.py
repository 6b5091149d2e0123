"""Scores by name. They rank the units of a model; interventions then measure how much the best units explain.

The command line reads the names, so each score is imported only when it is used.
"""

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import TYPE_CHECKING

from gossamer.errors import GossamerError

if TYPE_CHECKING:
    from gossamer.circuits.scores.base import Score

_PLACES = {
    "eap-ig-inputs": "eap_ig_inputs.EAP_IG_INPUTS",
    "eap-ig-activations": "eap_ig_activations.EAP_IG_ACTIVATIONS",
    "eap": "eap.EAP",
    "exact": "exact.EXACT",
    "learned-mask": "learned_mask.LEARNED_MASK",
    "learned-mask-complete": "learned_mask.LEARNED_MASK_COMPLETE",
}
"""Module and attribute of each score."""


class _Scores(Mapping[str, "Score"]):
    def __getitem__(self, name: str) -> "Score":
        module, attribute = _PLACES[name].split(".")
        score: Score = getattr(import_module(f"{__name__}.{module}"), attribute)
        return score

    def __iter__(self) -> Iterator[str]:
        return iter(_PLACES)

    def __len__(self) -> int:
        return len(_PLACES)


SCORES: Mapping[str, "Score"] = _Scores()
"""All scores, the default first."""


def find_score(name: str) -> "Score":
    """Look up a score by name.

    Raises:
        GossamerError: if there is no score of that name.
    """
    if name not in SCORES:
        raise GossamerError(f"there is no score {name!r}; there are {', '.join(SCORES)}")
    return SCORES[name]
