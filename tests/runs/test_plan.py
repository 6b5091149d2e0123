"""The estimate compared with manual counts and with tensors that a real forward pass keeps; the presets as data."""

from pathlib import Path

import pytest
import torch
from family_table import tiny_config
from transformers import AutoConfig

import gossamer
from families import CONFIGS, tiny_model, tokens
from gossamer import GossamerError
from gossamer.measures.losses import cross_entropy
from gossamer.runs.plan import MARGIN, alternatives, plan_run
from gossamer.runs.presets import find_preset, presets
from gossamer.runs.settings import RunConfig, SettingsSource
from gossamer.training.data import BlockDataset
from gossamer.training.settings import TrainingConfig
from gossamer.training.sparsity import SparsityTrainer
from gossamer.training.trainer import freeze_except

PARAMETERS = {"gpt2": 124_439_808, "smollm2": 134_515_008, "llama-3.2-1b": 1_235_814_400, "olmo-2-7b": 7_298_617_344}


def run(**settings: object) -> RunConfig:
    """Create the settings of a run with small steps, changed by the given ones."""
    small = {"model": "tiny", "text": "none", "seq_len": 16, "batch_size": 2, "precision": "fp32"}
    return RunConfig.from_dict({**small, **settings})


def tiny(name: str) -> dict:
    family, settings = CONFIGS[name]
    return {"model_type": family, **settings}


def test_every_preset_is_a_model_of_its_size_and_flags_that_there_are() -> None:
    assert set(presets()) == set(PARAMETERS)
    for name, preset in presets().items():
        assert plan_run(preset.config, run(batch_size=1), "cpu").parameters == PARAMETERS[name]
        RunConfig.from_sources([SettingsSource(preset.settings, name)])
        assert preset.settings["seq_len"] <= AutoConfig.for_model(**preset.config).max_position_embeddings
    with pytest.raises(GossamerError, match="no preset 'gpt3'; there are gpt2"):
        find_preset("gpt3")


@pytest.mark.parametrize("name", CONFIGS)
def test_activations_are_those_that_a_real_forward_pass_keeps(name: str) -> None:
    model = gossamer.add_gates(tiny_model(name))
    freeze_except(model, "all")
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if (address := tensor.untyped_storage().data_ptr()) not in own:
            kept[address] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(input_ids=tokens(2, 16), use_cache=False)
    real = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    estimate = plan_run(tiny(name), run(), "cpu").moments["loss"]["activations"]
    assert estimate == pytest.approx(real, rel=0.02)


def test_terms_are_what_can_be_counted_by_hand() -> None:
    count = sum(p.numel() for p in tiny_model("llama").parameters())
    plan = plan_run(tiny("llama"), run(), "cpu")
    loss, update = plan.moments["loss"], plan.moments["update"]
    assert plan.parameters == plan.trained == count
    assert loss["weights (float32)"] == 4 * count
    assert loss["AdamW states"] == 8 * count
    assert loss["logits and their gradient"] == 3 * 4 * 2 * 16 * 97  # including the dense model's logits
    assert loss["gradients"] == 0
    assert update["gradients"] == 4 * count
    twice = plan_run(tiny("llama"), run(gradient_accumulation=2, processes=2, constraint="kl"), "cpu")
    assert twice.moments["loss"]["gradients"] == 4 * count
    assert twice.moments["loss"]["gradient buckets of several GPUs"] == 4 * count
    assert twice.moments["loss"]["dense reference"] == 4 * count
    attention = plan_run(tiny("llama"), run(train="attention"), "cpu")
    assert attention.trained == 3 * (32 * 32 * 2 + 32 * 16 * 2)
    adapted = plan_run(tiny("llama"), run(train="lora", lora_rank=2), "cpu")
    assert adapted.trained == 3 * 2 * ((32 + 32) * 2 + (32 + 16) * 2)
    inside = plan_run(tiny("llama"), run(train="lora", lora_rank=2, constraint="kl"), "cpu").moments["loss"]
    assert inside["dense reference"] == 0
    assert inside["logits and their gradient"] == 3 * 4 * 2 * 16 * 97
    chosen = plan_run(tiny("llama"), run(train="lora", lora_rank=2, lora_targets=["up_proj"]), "cpu")
    assert chosen.trained == 3 * 2 * (32 + 48)
    less = plan_run(tiny("llama"), run(gradient_checkpointing=True), "cpu")
    assert less.moments["loss"]["activations"] < loss["activations"]


def test_operations_are_two_a_weight_and_product() -> None:
    plan = plan_run(tiny("gpt2"), run(), "cpu")
    layer = 32 * 96 + 32 * 32 + 2 * 32 * 128
    pairs = 16 * 17 / 2
    control = 16 * 6 * (3 * layer + 32 * 97) + 2 * 7 * 3 * 4 * 8 * pairs
    dense_pass = 16 * 2 * (3 * layer + 32 * 97) + 2 * 2 * 3 * 4 * 8 * pairs
    assert 16 * plan.flops_per_token == pytest.approx(control + dense_pass)
    assert plan.tokens_per_second(2, 100, 0.5) == pytest.approx(1e14 / plan.flops_per_token)
    assert 16 * plan.control_flops_per_token == pytest.approx(control)
    assert plan_run(tiny("gpt2"), run(constraint="kl"), "cpu").flops_per_token == plan.flops_per_token


def test_alternatives_end_where_a_step_fits() -> None:
    config, shape = presets()["llama-3.2-1b"].config, run(seq_len=1024, batch_size=8, precision="bf16")
    room = 24 * 2**30
    assert plan_run(config, shape).peak > room
    found = alternatives(config, shape, room)
    needed = [MARGIN * peak for _, _, peak in found]
    assert needed[-1] <= room
    assert all(bytes_needed > room for bytes_needed in needed[:-1])
    one = {"batch_size": 1, "gradient_accumulation": 8}
    assert [changes for changes, _, _ in found][:2] == [one, {**one, "gradient_checkpointing": True}]
    last, changed, _ = alternatives(config, shape, 1.0)[-1]
    assert last == {**one, "gradient_checkpointing": True, "train": "lora", "seq_len": 512}
    assert changed == RunConfig.from_dict({**shape.to_dict(), **last})
    adapted = run(seq_len=1024, batch_size=8, train="lora")
    assert "train" not in alternatives(config, adapted, 1.0)[-1][0]


def test_what_cannot_be_planned_is_named() -> None:
    with pytest.raises(GossamerError, match="bert is an encoder"):
        plan_run({"model_type": "bert"}, run(), "cpu")
    for family, reason in (("falcon", "does not call"), ("mixtral", "mixture of experts"), ("mamba", "does not call")):
        with pytest.raises(GossamerError, match=f"{family} .*{reason}"):
            plan_run(tiny_config(family).to_dict() | {"model_type": family}, run(), "cpu")
    with pytest.raises(GossamerError, match="--seq-len 65 is over the model's context of 64"):
        plan_run(tiny("llama"), run(seq_len=65), "cpu")


def test_gradient_checkpointing_changes_no_gradient(tmp_path: Path) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = gossamer.add_gates(tiny_model("llama")).train()
        config = TrainingConfig(gradient_checkpointing=checkpointing, checkpoint_every=0)
        SparsityTrainer(model, None, 3.0, config, BlockDataset(tokens(4, 16)), tokens(1, 16), tmp_path, steps=1)
        assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules()) == checkpointing
        ids = tokens(2, 16)
        with gossamer.sampled_gates(model, seed=1):
            with gossamer.counted_links(model) as counts:
                logits = model(input_ids=ids, use_cache=False).logits
            expected = torch.stack([count.expected_open.sum() for count in counts.values()]).sum()
            (cross_entropy(logits, ids) + 1e-3 * expected).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, again in zip(*gradients, strict=True):
        assert plain is not None
        torch.testing.assert_close(again, plain)
