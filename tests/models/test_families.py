"""Every family that is said to be right, tiny and random; and the page of the documentation, made anew."""

import contextlib

import pytest
from family_table import (
    TABLE,
    check_circuits,
    check_edges,
    check_explanations,
    check_gates,
    families,
    quietly,
    row_of,
    table,
    tiny_model,
)

from families import CONFIGS
from gossamer.errors import GossamerError
from gossamer.models.architectures import PROVEN

# Those of CONFIGS are tested by everything else.
OTHERS = sorted(PROVEN - {model_type for model_type, _ in CONFIGS.values()})


@pytest.mark.parametrize("family", OTHERS)
def test_gates_circuits_and_explanations_are_right_or_refused(family: str) -> None:
    model = tiny_model(family)
    check_gates(model)
    for check in (check_circuits, check_edges, check_explanations):
        with contextlib.suppress(GossamerError):  # the page says which; the slow test below, that it is right
            check(model)


@pytest.mark.slow
def test_the_page_of_families_is_true() -> None:
    quietly()
    rows = [row_of(family) for family in families()]
    assert table(rows) == TABLE.read_text(encoding="utf-8")
    assert {tiny_model(row.family).config.model_type for row in rows if row.gates is None} == PROVEN


def test_the_page_lists_what_is_proven() -> None:
    listed = TABLE.read_text(encoding="utf-8").split("## Refused")[0]
    assert all(f"| {family} |" in listed for family in PROVEN)
