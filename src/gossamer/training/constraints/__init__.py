"""Kinds of constraint, one a file; :mod:`gossamer.training.constraints.base` says what one is."""

from gossamer.training.constraints.base import Constraint, Outcome
from gossamer.training.constraints.cross_entropy import CrossEntropy
from gossamer.training.constraints.kl_divergence import KLDivergence

CONSTRAINTS: dict[str, type[Constraint]] = {
    CrossEntropy.name: CrossEntropy,
    KLDivergence.name: KLDivergence,
}
"""The kinds that there are, by name."""

__all__ = ["CONSTRAINTS", "Constraint", "CrossEntropy", "KLDivergence", "Outcome"]
