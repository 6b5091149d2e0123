"""Runs with adapters: their files, the dense model inside the sparse one, and variants of the plain run."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import gossamer
from families import tiny_model, tokens
from gossamer import GossamerError
from gossamer.models.lora import add_adapters
from gossamer.runs.job import post_train
from gossamer.runs.record import Run
from gossamer.runs.settings import RunConfig
from gossamer.training.constraints import KLDivergence
from gossamer.training.data import BlockDataset
from gossamer.training.multiplier import MultiplierConfig
from gossamer.training.settings import TrainingConfig
from gossamer.training.sparsity import SparsityTrainer
from gossamer.training.trainer import PostTrainer, freeze_except, no_dropout

BLOCKS = tokens(32, 16)
VALIDATION = tokens(5, 16, seed=1)


def trained(folder: Path, *, part: str = "lora", copied: bool = False, steps: int = 6, **settings) -> SparsityTrainer:
    """Train with a bound on KL and return the trainer; with ``copied``, the reference is a separate model."""
    config = TrainingConfig(
        **{
            "train": part,
            "precision": "fp32",
            "constraint": KLDivergence(),
            "checkpoint_every": 0,
            "validations": 3,
            **settings,
        }
    )
    model = gossamer.add_gates(tiny_model("llama"))
    if part == "lora":
        add_adapters(model, rank=2, alpha=4.0, seed=config.seed)
    else:
        freeze_except(model, part)
    reference = tiny_model("llama") if copied or part != "lora" else None
    trainer = SparsityTrainer(model, reference, 0.0, config, BlockDataset(BLOCKS), VALIDATION, folder, steps=steps)
    with no_dropout(model):
        trainer.prepare(open_gates=False)
        trainer.train()
    return trainer


def moved(trainer: PostTrainer) -> dict[str, torch.Tensor]:
    return {name: value.detach() for name, value in trainer.model.named_parameters() if value.requires_grad}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_dense_model_inside_is_as_good_a_reference_as_a_copy(checkpointing: bool, tmp_path: Path) -> None:
    settings = {"gradient_checkpointing": checkpointing, "hard_fraction": 0.5}
    inside = trained(tmp_path, **settings)
    copied = trained(tmp_path, copied=True, **settings)
    assert inside.reference is None
    assert inside.last == copied.last
    assert inside.validation_result == copied.validation_result
    assert inside.last["constrained"] > 0.01
    assert moved(inside).keys() == moved(copied).keys()
    assert all(torch.equal(value, moved(copied)[name]) for name, value in moved(inside).items())
    dense = tiny_model("llama").state_dict()
    below = {name.replace(".base_layer", ""): value for name, value in inside.model.state_dict().items()}
    assert all(torch.equal(below[name], dense[name]) for name in dense)


def compare(a: SparsityTrainer, b: SparsityTrainer, *, rtol: float, atol: float) -> None:
    assert moved(a).keys() == moved(b).keys()
    for name, value in moved(a).items():
        torch.testing.assert_close(value, moved(b)[name], rtol=rtol, atol=atol)


@pytest.mark.parametrize("part", ["lora", "attention"])
def test_two_passes_of_one_block_are_one_of_two_under_hard_gates(part: str, tmp_path: Path) -> None:
    """With sampled gates the results differ: the noise of a row depends on its pass."""
    ends = [
        trained(tmp_path, part=part, batch_size=size, gradient_accumulation=2 // size, hard_fraction=1.0)
        for size in (2, 1)
    ]
    compare(*ends, rtol=1e-3, atol=1e-5)
    assert ends[0].last == pytest.approx(ends[1].last, rel=1e-4)


@pytest.mark.parametrize("part", ["lora", "attention"])
def test_checkpointed_activations_give_the_same_run_under_sampled_gates(part: str, tmp_path: Path) -> None:
    ends = [
        trained(tmp_path, part=part, batch_size=2, gradient_checkpointing=kept, hard_fraction=0.0)
        for kept in (False, True)
    ]
    assert ends[1].model.model.layers[0].gradient_checkpointing
    compare(*ends, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("part", ["lora", "all"])
@pytest.mark.parametrize("hard_fraction", [0.0, 1.0])
def test_a_run_in_bf16_follows_that_in_fp32(part: str, hard_fraction: float, tmp_path: Path) -> None:
    """bfloat16 has 8 bits: after 20 steps, metrics agree to 5 %, open links to 2 %, and weights moved alike."""
    start = moved(trained(tmp_path, part=part, steps=1, learning_rate=0.0, gate_learning_rate=0.0))
    # With a low, constant lambda, gates move away from 0, where rounding alone would decide them.
    steady = MultiplierConfig(0.02, proportional=0.0, integral=0.0)
    settings = {"part": part, "steps": 20, "validations": 4, "hard_fraction": hard_fraction, "learning_rate": 3e-4,
                "gate_learning_rate": 0.03, "multiplier": steady}  # fmt: skip
    exact, rounded = (trained(tmp_path, precision=precision, **settings) for precision in ("fp32", "bf16"))
    for key, tolerance in (("constrained", 0.05), ("constrained_held_out", 0.05), ("open_fraction", 0.02),
                           ("expected_open_fraction", 0.02), ("multiplier", 0.02)):  # fmt: skip
        assert rounded.last[key] == pytest.approx(exact.last[key], rel=tolerance), key
    ways = []
    for trainer in (exact, rounded):
        assert all(value.dtype == torch.float32 for value in moved(trainer).values())
        weights = [v - start[name] for name, v in moved(trainer).items() if not name.endswith("gate_bias")]
        ways.append(torch.cat([weight.flatten() for weight in weights]))
    assert not torch.equal(*ways)
    assert torch.cosine_similarity(*ways, dim=0) > 0.9


@pytest.fixture
def config(saved_llama: Path, text: Path) -> RunConfig:
    training = TrainingConfig(train="lora", precision="fp32", constraint=KLDivergence(epsilon=5.0), checkpoint_every=2,
                              validations=3)  # fmt: skip
    return RunConfig(
        model=str(saved_llama), text=str(text), tokens=8 * 64, seq_len=16, validation_tokens=64, held_out_tokens=64,
        lora_rank=2, lora_alpha=8.0, lora_targets=("q_proj", "mlp.up_proj"), training=training,
    )  # fmt: skip


def files(run: Run) -> dict[str, torch.Tensor]:
    """Load all saved weights of a run, by file and name."""
    parts = ("model/gossamer", "control/model", "adapter/adapter_model", "adapter/gossamer_gates")
    return {
        f"{part}:{name}": value
        for part in parts
        for name, value in load_file(run.folder / f"{part}.safetensors").items()
    }


def test_a_run_leaves_adapters_that_give_its_model_on_the_base(config: RunConfig, tmp_path: Path) -> None:
    run = post_train(config, tmp_path / "run")
    base = gossamer.models.pretrained.load_dense(config.model)[0]
    merged, loaded = gossamer.load(run.model), gossamer.load_adapter(run.adapter, base)
    outputs = []
    for model in (merged, loaded):
        with torch.no_grad(), gossamer.counted_links(model) as counts:
            logits = model(input_ids=VALIDATION).logits
        outputs.append((logits, torch.stack([count.open_links for count in counts.values()])))
    assert torch.equal(outputs[0][0], outputs[1][0])
    assert torch.equal(outputs[0][1], outputs[1][1])
    adapter = json.loads((run.adapter / "adapter_config.json").read_text())
    assert adapter["lora_alpha"] == 8.0
    assert set(adapter["target_modules"]) == {"q_proj", "mlp.up_proj"}
    control = load_file(run.control / "model.safetensors")
    for model in (merged.state_dict(), control):
        other = {name for name, value in base.state_dict().items() if not torch.equal(value, model[name])}
        assert other == {f"model.layers.{i}.{p}.weight" for i in range(3) for p in ("self_attn.q_proj", "mlp.up_proj")}


def test_a_run_with_adapters_that_stopped_twice_ends_like_one_never_stopped(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = files(post_train(config, tmp_path / "whole"))
    torch.manual_seed(1)
    for trainer in (SparsityTrainer, PostTrainer):
        original = trainer.batch_objective

        def dies_in_the_sixth_step(self, *args, trainer=trainer, original=original, **kwargs):
            if type(self) is trainer and self.state.global_step == 5:
                raise KeyboardInterrupt
            return original(self, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(trainer, "batch_objective", dies_in_the_sixth_step)
            with pytest.raises(KeyboardInterrupt):
                post_train(config, tmp_path / "stopped", resume=True)
    stopped = files(post_train(config, tmp_path / "stopped", resume=True))
    assert whole.keys() == stopped.keys()
    assert all(torch.equal(value, stopped[name]) for name, value in whole.items())
    with pytest.raises(GossamerError, match="begun with lora_targets"):
        post_train(RunConfig(**{**vars(config), "lora_targets": ()}), tmp_path / "stopped", resume=True)


def test_a_target_that_is_in_no_layer_stops_a_run_before_anything_is_written(config: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(GossamerError, match="linear map 'q_prj'"):
        post_train(RunConfig(**{**vars(config), "lora_targets": ("q_prj",)}), tmp_path / "run")
    assert not list(tmp_path.iterdir())
