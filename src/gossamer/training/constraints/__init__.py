"""Kinds of constraint, one per file; :mod:`gossamer.training.constraints.base` defines the interface."""

from gossamer.training.constraints.base import Constraint, Outcome
from gossamer.training.constraints.cross_entropy import CrossEntropy
from gossamer.training.constraints.kl_divergence import KLDivergence

CONSTRAINTS: dict[str, type[Constraint]] = {
    CrossEntropy.name: CrossEntropy,
    KLDivergence.name: KLDivergence,
}
"""Registry of the kinds of constraint, by name."""

__all__ = ["CONSTRAINTS", "Constraint", "CrossEntropy", "KLDivergence", "Outcome"]
