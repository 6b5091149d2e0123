"""Settings of the link search. The command line builds its options from them, so this module imports nothing heavy."""

from dataclasses import dataclass
from typing import Literal

from gossamer.errors import GossamerError
from gossamer.fields import LARGEST_SEED, documented, setting

Kind = Literal["sufficient", "complete"]

SHARES = (0.5, 0.8, 0.9, 0.95)
"""Shares of the metric for which sets are reported in addition to the requested share."""


@documented
@dataclass(frozen=True)
class ExplainConfig:
    """What the set of links has to achieve, and how many searches to run.

    The smallest set of all seeds is the explanation; the others show how stable it is.
    """

    links: Kind | None = setting(
        "sufficient: these links alone keep --share of the metric. complete: also, without them at most the rest "
        "remains.",
        None,
        shown_default="sufficient; complete with --dense",
    )
    share: float = setting("Share of the metric that the links must keep.", 0.9)
    seeds: int = setting("Number of searches; the overlap of the sets they find is reported.", 2, least=1, most=1_000)
    seed: int = setting("Seed of the first search.", 0, least=0, most=LARGEST_SEED)
    shares: tuple[float, ...] = SHARES

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise GossamerError(
                f"--share {self.share:g} of the metric cannot be kept; give one between 0 and 1, as 0.9"
            )
