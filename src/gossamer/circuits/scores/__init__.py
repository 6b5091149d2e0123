"""The scores by name: they rank the units of a model; interventions then say how much the best of them explain."""

from gossamer.circuits.scores.base import Score
from gossamer.circuits.scores.eap import EAP
from gossamer.circuits.scores.eap_ig_activations import EAP_IG_ACTIVATIONS
from gossamer.circuits.scores.eap_ig_inputs import EAP_IG_INPUTS
from gossamer.circuits.scores.exact import EXACT
from gossamer.circuits.scores.learned_mask import LEARNED_MASK, LEARNED_MASK_COMPLETE
from gossamer.errors import GossamerError

__all__ = ["SCORES", "Score", "find_score"]

SCORES: dict[str, Score] = {
    score.name: score for score in (EAP_IG_INPUTS, EAP_IG_ACTIVATIONS, EAP, EXACT, LEARNED_MASK, LEARNED_MASK_COMPLETE)
}


def find_score(name: str) -> Score:
    """The score of that name.

    Raises:
        GossamerError: if there is none.
    """
    if name not in SCORES:
        raise GossamerError(f"there is no score {name!r}; there are {', '.join(SCORES)}")
    return SCORES[name]
