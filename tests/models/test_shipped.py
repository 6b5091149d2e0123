"""The sparse model that gossamer ships, loaded from its files alone: small, and as its card describes it."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import gossamer
from gossamer.errors import GossamerError
from gossamer.evaluation.lengths import measure_at_length
from gossamer.models.lora_files import adapter_base
from gossamer.models.pretrained import load_dense
from gossamer.models.shipped import SHIPPED, load_shipped, shipped_adapter
from gossamer.names import SMOLLM2, SMOLLM2_SPARSE
from gossamer.training.data import pack

PAGE = Path(__file__).parents[2] / "scripts" / "page.txt"


@pytest.mark.parametrize("name", SHIPPED)
def test_it_is_small_and_described(name: str) -> None:
    folder = shipped_adapter(name)
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 25 * 2**20
    card, metrics = (folder / "README.md").read_text(), json.loads((folder / "metrics.json").read_text())
    held_out = metrics["held_out"]
    assert f"{100 * held_out['open_fraction']:.2f} %" in card
    assert f"{held_out['kl']:.3f} ± {held_out['kl_stderr']:.3f} ({'met' if metrics['met'] else 'not met'})" in card
    assert metrics["met"] == (held_out["kl"] <= metrics["bound"])
    for row in metrics["lengths"]:
        assert f"| {row['seq_len']:,} | {row['loss_dense']:.3f} | {row['loss_sparse']:.3f} |" in card


@pytest.mark.parametrize("name", SHIPPED)
def test_its_figures_on_a_page_are_those_of_its_record(name: str) -> None:
    sparse, tokenizer = load_shipped(name)
    blocks = pack([PAGE.read_text()], tokenizer, 128, name=str(PAGE))
    found = measure_at_length(sparse, load_dense(SMOLLM2)[0], blocks, "fp32")
    recorded = json.loads((shipped_adapter(name) / "metrics.json").read_text())["page"]
    for key in ("loss_dense", "loss_sparse", "kl", "open_fraction"):
        # Other processors round differently, which may open or close a gate or two.
        assert found[key] == pytest.approx(recorded[key], rel=0.005), key
    loaded = gossamer.load(name)
    assert gossamer.is_gated(loaded)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), sparse.parameters(), strict=True))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"target_modules": "(a+)+$"}, "target_modules is .*not a list"),
        ({"target_modules": ["(a+)+$"]}, "no name of a module"),
        ({"rank_pattern": {"(a+)+$": 2}}, "it sets rank_pattern, which gossamer does not"),
        ({"alora_invocation_tokens": [1]}, "it sets alora_invocation_tokens"),
        ({"lora_alpha": float("nan")}, "NaN is no number"),
        ({"r": 0}, "r is 0"),
    ],
)
def test_adapters_with_settings_that_gossamer_does_not_write_are_refused(
    changes: dict, said: str, tmp_path: Path
) -> None:
    """peft would use some of them as regular expressions, which may take forever."""
    folder = Path(shutil.copytree(shipped_adapter(SMOLLM2_SPARSE), tmp_path / "adapter"))
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(GossamerError, match=said):
        adapter_base(folder)
