"""Measures, bounds and messages of each kind of constraint, compared with PyTorch and worked examples."""

import math
from dataclasses import fields

import pytest
import torch
from torch.nn import functional

from gossamer import GossamerError
from gossamer.measures.language import LanguageMetrics
from gossamer.measures.links import LinkCounter
from gossamer.training.constraints import CONSTRAINTS, Constraint, CrossEntropy, KLDivergence


def figures(losses: list[float], kls: list[float] | None = None) -> LanguageMetrics:
    both = [None if one is None else torch.tensor(one, dtype=torch.double) for one in (losses, kls)]
    return LanguageMetrics(both[0], both[1], 100, LinkCounter.empty(1, 1))


def test_the_cross_entropy_is_measured_and_carries_a_gradient() -> None:
    logits, ids = torch.randn(2, 5, 7, requires_grad=True), torch.randint(7, (2, 5))
    found = CrossEntropy().measure(logits, None, ids)
    wanted = functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(one, logits)[0] for one in (found, wanted)))


def test_the_divergence_is_from_the_dense_model() -> None:
    logits, dense, ids = torch.randn(2, 5, 7), torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    p, q = dense[:, :-1].log_softmax(-1), logits[:, :-1].log_softmax(-1)
    wanted = (p.exp() * (p - q)).sum(-1).mean()
    torch.testing.assert_close(KLDivergence().measure(logits, dense, ids), wanted)
    assert KLDivergence.needs_dense
    assert (CrossEntropy.relative_to_dense, KLDivergence.relative_to_dense) == (True, False)


def test_bounds_are_what_was_given_or_follow_from_the_dense_model() -> None:
    assert CrossEntropy(slack=0.02).bound(3.0) == 3.02
    assert CrossEntropy(tau=2.5).bound(3.0) == 2.5
    assert KLDivergence(epsilon=0.2).bound(3.0) == 0.2


def test_violations_are_measured_in_the_bound_or_a_tenth_of_a_nat() -> None:
    assert CrossEntropy(slack=0.01).unit == CrossEntropy(slack=0.01).tolerance(3.0) == 0.1
    assert CrossEntropy(slack=0.0).tolerance(2e-4) == 2e-4
    assert CrossEntropy(tau=-1.0).tolerance(3.0) > 0
    assert KLDivergence(epsilon=0.3).unit == KLDivergence(epsilon=0.3).tolerance(3.0) == 0.3


def test_what_pulls_is_a_mixture_of_the_text_and_the_teacher() -> None:
    logits, dense, ids = torch.randn(2, 5, 7), torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    loss, kl = CrossEntropy().measure(logits, dense, ids), KLDivergence().measure(logits, dense, ids)
    pull = CrossEntropy(distillation=0.25).training_loss(loss, logits, dense, ids)
    torch.testing.assert_close(pull, 0.75 * loss + 0.25 * kl)
    assert CrossEntropy(distillation=0.0).training_loss(loss, logits, dense, ids) is loss
    assert KLDivergence().training_loss(kl, logits, dense, ids) is kl


def test_the_error_is_that_of_what_the_bound_leaves_open() -> None:
    """Block losses of both models vary with the text, so differences are used unless the bound is a given number."""
    sparse, dense = figures([1.0, 3.0, 5.5], [0.1, 0.3, 0.2]), figures([1.0, 3.0, 5.0])
    own, given = CrossEntropy(slack=0.0).outcome(sparse, dense), CrossEntropy(tau=4.0).outcome(sparse, dense)
    assert (own.value, own.bound, own.met) == (pytest.approx(9.5 / 3), pytest.approx(3.0), False)
    assert own.stderr == pytest.approx(torch.tensor([0.0, 0.0, 0.5]).std().item() / math.sqrt(3))
    assert (given.met, given.stderr) == (True, pytest.approx(torch.tensor([1.0, 3.0, 5.5]).std().item() / math.sqrt(3)))
    kl = KLDivergence(epsilon=0.2).outcome(sparse, dense)
    assert (kl.value, kl.bound) == (pytest.approx(0.2), 0.2)
    assert kl.stderr == pytest.approx(0.1 / math.sqrt(3))


def test_what_the_user_should_know_is_said() -> None:
    (line,) = CrossEntropy(tau=2.5).warnings(3.0)
    assert line == "tau 2.500 is below the dense model's held-out loss 3.000: the constraint may be out of reach"
    assert CrossEntropy().warnings(3.0) == KLDivergence().warnings(3.0) == []
    assert KLDivergence(epsilon=0.2).words(3.0) == {"name": "kl", "symbol": "ε", "label": "KL", "bound": 0.2}


@pytest.mark.parametrize("epsilon", [0.0, -1.0])
def test_a_divergence_of_nothing_cannot_be_held(epsilon: float) -> None:
    with pytest.raises(GossamerError, match=f"--epsilon {epsilon:g} cannot be held: no KL is below 0"):
        KLDivergence(epsilon=epsilon).check()


@pytest.mark.parametrize("kind", CONSTRAINTS.values())
def test_every_kind_says_what_it_is(kind: type[Constraint]) -> None:
    assert CONSTRAINTS[kind.name] is kind
    assert all((kind.symbol, kind.label, kind.bound_name, kind.summary))
    for field in fields(kind):
        assert f"{field.name}: {field.metadata['help']}" in (kind.__doc__ or "")
