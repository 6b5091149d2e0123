"""Every family listed as correct, as a tiny random model; and the documentation's page of families, regenerated."""

import contextlib
from pathlib import Path

import pytest
import torch
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
    tokens,
)

import gossamer
from families import CONFIGS
from gossamer.errors import GossamerError
from gossamer.models.architectures import PROVEN
from gossamer.models.lora import add_adapters

# All other tests cover the families of CONFIGS.
OTHERS = sorted(PROVEN - {model_type for model_type, _ in CONFIGS.values()})


@pytest.mark.parametrize("family", OTHERS)
def test_gates_circuits_and_explanations_are_right_or_refused(family: str) -> None:
    model = tiny_model(family)
    check_gates(model)
    for check in (check_circuits, check_edges, check_explanations):
        with contextlib.suppress(GossamerError):  # the page lists these; the slow test below checks it
            check(model)


@pytest.mark.slow
@pytest.mark.parametrize("family", OTHERS)
def test_models_are_saved_loaded_and_trained_with_adapters(family: str, tmp_path: Path) -> None:
    model, ids = gossamer.add_gates(tiny_model(family), gate_bias=0.3), tokens(2, 9)
    gossamer.save(model, tmp_path / "model")
    with torch.no_grad():
        wanted, found = (
            each(input_ids=ids, use_cache=False).logits for each in (model, gossamer.load(tmp_path / "model"))
        )
    assert (found - wanted).abs().max() < 1e-5 * max(1.0, wanted.abs().max())
    add_adapters(model, rank=2, alpha=4.0)
    with gossamer.sampled_gates(model, seed=1), gossamer.counted_links(model) as counts:
        loss = model(input_ids=ids, use_cache=False).logits.square().mean()
        (loss + sum(count.expected_open.sum() for count in counts.values())).backward()
    adapters = [parameter for name, parameter in model.named_parameters() if "lora_B" in name]
    assert adapters
    assert all(parameter.grad.abs().max() > 0 for parameter in adapters)
    gossamer.save_adapter(model, tmp_path / "adapter")
    loaded = gossamer.load_adapter(tmp_path / "adapter", tiny_model(family))
    with torch.no_grad():
        wanted, found = (each(input_ids=ids, use_cache=False).logits for each in (model.eval(), loaded.eval()))
    assert (found - wanted).abs().max() < 1e-5 * max(1.0, wanted.abs().max())


@pytest.mark.slow
def test_the_page_of_families_is_true() -> None:
    quietly()
    rows = [row_of(family) for family in families()]
    assert table(rows) == TABLE.read_text(encoding="utf-8")
    assert {tiny_model(row.family).config.model_type for row in rows if row.gates is None} == PROVEN


def test_the_page_lists_what_is_proven() -> None:
    listed = TABLE.read_text(encoding="utf-8").split("## Refused")[0]
    assert all(f"| {family} |" in listed for family in PROVEN)
