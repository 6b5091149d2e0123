"""Settings of the circuit search. The command line derives its options from them, so heavy imports are avoided."""

from dataclasses import dataclass
from typing import Literal

from gossamer.circuits.ablations import ABLATIONS
from gossamer.circuits.scores import SCORES
from gossamer.fields import LARGEST_SEED, documented, setting

Level = Literal["nodes", "edges", "links"]
LEVELS: tuple[Level, ...] = ("nodes", "edges", "links")


@documented
@dataclass(frozen=True)
class PromptConfig:
    """Which prompts of a task are used."""

    examples: int = setting("Number of prompts.", 100, least=1, most=100_000)
    corruption: str | None = setting("How prompts are corrupted.", None, shown_default="the task's first")
    seed: int = setting("Seed of the prompts.", 0, least=0, most=LARGEST_SEED)


@documented
@dataclass(frozen=True)
class SearchConfig(PromptConfig):
    """Settings of the circuit search.

    Links are skipped if the ablation or the score is not defined for them.
    """

    seeds: int = setting(
        "Repeat with this many seeds, starting at --seed, and show the spread.", 1, least=1, most=1_000
    )
    rephrased: bool = setting("Repeat with each of the task's other sets of templates.", False)
    levels: tuple[Level, ...] = setting("Comma-separated: nodes, edges, links.", LEVELS)
    score: str = setting(
        f"How units are scored: {', '.join(SCORES)}. The learned masks search for a set of units instead.",
        "eap-ig-inputs",
    )
    ablation: str = setting(
        "What units outside a circuit carry: the corrupted run's values (patch), zero, or the mean.",
        "patch",
        choices=tuple(ABLATIONS),
    )
    signed: bool = setting("Rank units by signed score instead of absolute score.", False)
    batch_size: int = setting("Prompts per forward pass.", 16, least=1, most=2**20)
    force: bool = setting("Continue even if a model cannot do the task.", False)
    replace: bool = setting("Overwrite a result that was found with other settings.", False)
