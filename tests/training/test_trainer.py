"""The trainer on tiny models: what moves, what is measured, what survives a stop."""

import math
from pathlib import Path

import pytest
import torch

import gossamer
from families import tiny_model, tokens
from gossamer import GossamerError
from gossamer.measures.losses import cross_entropy, kl_divergence
from gossamer.models.architectures import attention_modules
from gossamer.models.checkpoint import gate_biases
from gossamer.models.lora import add_adapters, merge_adapters
from gossamer.training.checkpoints import checkpoints, fault, last_sound
from gossamer.training.constraints import CONSTRAINTS
from gossamer.training.data import BlockDataset
from gossamer.training.stream import BlockStream
from gossamer.training.trainer import PostTrainer, SparsityTrainer, TrainingConfig, choose_trained, without_dropout

BLOCKS = tokens(32, 16)
VALIDATION = tokens(5, 16, seed=1)


def make_trainer(folder: Path, bound: float = 0.05, family: str = "llama", **settings) -> SparsityTrainer:
    steps = settings.pop("steps", 6)
    config = TrainingConfig(
        **{"batch_size": 4, "checkpoint_every": 2, "validate_every": 3, "precision": "fp32", **settings}
    )
    dense = tiny_model(family)
    model = gossamer.sparsify(dense)
    choose_trained(model, config.train)
    return SparsityTrainer(model, dense, bound, config, BlockDataset(BLOCKS), VALIDATION, folder, steps=steps)


def weights(trainer: PostTrainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_training_closes_links(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, bound=100.0, steps=40, checkpoint_every=0, gate_learning_rate=0.3)
    trainer.train()
    assert trainer.last["open_fraction"] < 0.1
    assert trainer.last["multiplier"] < 0.02
    assert (gate_biases(trainer.model) < -0.5).all()


@pytest.mark.parametrize("objective", ["fraction", "log"])
def test_what_is_minimised_is_the_open_fraction_or_its_log(objective: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, objective=objective)
    value, measured = trainer.batch_objective(trainer.model, BLOCKS[:4])
    fraction, multiplier = measured["expected_open_fraction"], trainer.multiplier.value
    sparsity = fraction if objective == "fraction" else math.log(fraction)
    violation = measured["constrained"] - 0.05
    assert value.item() == pytest.approx((sparsity + multiplier * violation) / (1 + multiplier), rel=1e-5)


def test_a_bound_out_of_reach_raises_the_multiplier(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, bound=-10.0, steps=10, checkpoint_every=0)
    trainer.train()
    dual_steps = 10 - 2  # from the first measurement, after step 3, on
    assert trainer.multiplier.value == pytest.approx(0.02 * math.exp(dual_steps * 0.5 * 0.1))


@pytest.mark.parametrize("kind", ["ce", "kl"])
def test_the_multiplier_follows_the_validation_blocks_under_hard_gates(kind: str, tmp_path: Path) -> None:
    settings = {
        "constraint": CONSTRAINTS[kind](),
        "steps": 2,
        "validate_every": 2,
        "checkpoint_every": 0,
        "hard_fraction": 0.0,
    }
    trainer = make_trainer(tmp_path, bound=0.25, **settings)
    trainer.train()
    with torch.no_grad():
        logits = trainer.model.eval()(input_ids=VALIDATION).logits
        if kind == "ce":
            expected = cross_entropy(logits, VALIDATION)
        else:
            expected = kl_divergence(tiny_model("llama")(input_ids=VALIDATION).logits, logits)
    assert trainer.last["constrained_held_out"] == pytest.approx(expected.item(), rel=1e-5)
    assert trainer.multiplier.mean_violation == pytest.approx(expected.item() - 0.25, rel=1e-4)
    assert trainer.last["sampled"] == 1.0


@pytest.mark.parametrize("part", ["attention", "all"])
def test_only_the_chosen_part_moves(part: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, train=part, steps=2, checkpoint_every=0)
    before = weights(trainer)
    trainer.train()
    moved = {name for name, value in weights(trainer).items() if not torch.equal(value, before[name])}
    attention = {f"model.layers.{i}.self_attn.{p}_proj.weight" for i in range(3) for p in "qkvo"}
    gates = {f"model.layers.{i}.self_attn.gate_bias" for i in range(3)}
    assert moved == (attention | gates if part == "attention" else set(before))


def test_lora_moves_adapters_only_and_merges_to_the_same_function(tmp_path: Path) -> None:
    dense = tiny_model("llama")
    model = gossamer.sparsify(dense)
    add_adapters(model, rank=2, alpha=4.0)
    for module in attention_modules(model):
        module.gate_bias.requires_grad_(True)
    config = TrainingConfig(train="lora", batch_size=4, checkpoint_every=0, precision="fp32")
    before = {n: p.clone() for n, p in model.named_parameters()}
    SparsityTrainer(model, None, 0.05, config, BlockDataset(BLOCKS), VALIDATION, tmp_path, steps=3).train()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved
    assert all("lora_" in name or "gate_bias" in name for name in moved)
    model.eval()
    with torch.no_grad():
        wanted = model(input_ids=tokens(1, 9)).logits
        merge_adapters(model)
        torch.testing.assert_close(model(input_ids=tokens(1, 9)).logits, wanted, rtol=1e-4, atol=1e-4)
    assert set(model.state_dict()) == set(gossamer.sparsify(dense).state_dict())


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(tmp_path: Path) -> None:
    runs = []
    for seed in (0, 0, 1):
        trainer = make_trainer(tmp_path / str(len(runs)), seed=seed, checkpoint_every=0)
        trainer.train()
        runs.append(weights(trainer))
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation": 2, "batch_size": 2}, {"steps": 20}])
def test_a_resumed_run_ends_bit_for_bit_like_one_never_stopped(settings: dict, tmp_path: Path) -> None:
    whole = make_trainer(tmp_path / "whole", **settings)
    whole.train()
    stopped = make_trainer(tmp_path / "stopped", **settings)

    original, calls = stopped.training_step, 0

    def dies_in_the_fourth_step(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls > 3 * settings.get("gradient_accumulation", 1):
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    stopped.training_step = dies_in_the_fourth_step
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    resumed = make_trainer(tmp_path / "stopped", **settings)
    checkpoint, faults = last_sound(tmp_path / "stopped")
    assert checkpoint.name == "checkpoint-2"
    assert not faults
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert same(weights(whole), weights(resumed))
    assert resumed.multiplier.state_dict() == whole.multiplier.state_dict()
    assert resumed.validation_result == whole.validation_result


def test_resuming_a_stream_from_its_last_checkpoint_trains_no_further(text: Path, tokenizer, tmp_path: Path) -> None:
    def trainer() -> SparsityTrainer:
        made = make_trainer(tmp_path / "run", steps=4, validate_every=4)
        made.stream = made.train_dataset = BlockStream(str(text), tokenizer, 16, most=4)
        made.args.ignore_data_skip = True
        return made

    whole = trainer()
    whole.train()
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert resumed.state.global_step == 4
    assert same(weights(whole), weights(resumed))
    assert resumed.validation_result == whole.validation_result
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-2", "checkpoint-4"]


def test_gradient_accumulation_equals_one_large_batch(tmp_path: Path) -> None:
    """With hard gates there is no noise to differ, and the mean over equal batches is the mean over all."""
    ends = []
    for batch_size, accumulation in ((4, 1), (2, 2)):
        trainer = make_trainer(
            tmp_path / str(batch_size),
            batch_size=batch_size,
            gradient_accumulation=accumulation,
            hard_fraction=1.0,
            steps=2,
            checkpoint_every=0,
        )
        trainer.train()
        ends.append(weights(trainer))
    for name in ends[0]:
        torch.testing.assert_close(ends[0][name], ends[1][name], rtol=1e-3, atol=1e-5)


def test_recomputed_activations_meet_the_same_gates(tmp_path: Path) -> None:
    ends = []
    for recompute in (False, True):
        trainer = make_trainer(tmp_path / str(recompute), steps=3, hard_fraction=0.0, checkpoint_every=0)
        if recompute:
            trainer.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        trainer.train()
        ends.append(weights(trainer))
    for name in ends[0]:
        torch.testing.assert_close(ends[0][name], ends[1][name], rtol=1e-4, atol=1e-6)


def test_only_the_last_two_checkpoints_stay_and_each_is_a_loadable_model(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.train()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-6"]
    assert all(fault(path) is None for path in checkpoints(tmp_path))
    loaded = gossamer.load(tmp_path / "checkpoint-6")
    trainer.model.eval()
    with torch.no_grad():
        ids = tokens(1, 9)
        assert torch.equal(loaded(input_ids=ids).logits, trainer.model(input_ids=ids).logits)


@pytest.mark.parametrize(
    "harm,message",
    [
        (lambda f: (f / "optimizer.pt").write_bytes((f / "optimizer.pt").read_bytes()[:99]), "has 99 of"),
        (lambda f: (f / "multiplier.json").unlink(), "multiplier.json is missing"),
        (lambda f: (f / "multiplier.json").write_text("x" * (f / "multiplier.json").stat().st_size), "has changed"),
        (lambda f: (f / "checksums.json").unlink(), "missing or damaged"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_passed_over(harm, message: str, tmp_path: Path) -> None:
    make_trainer(tmp_path).train()
    harm(tmp_path / "checkpoint-6")
    checkpoint, faults = last_sound(tmp_path)
    assert checkpoint.name == "checkpoint-4"
    assert len(faults) == 1
    assert message in faults[0]


def test_the_sparsest_weights_that_held_the_bound_are_kept(tmp_path: Path) -> None:
    """The bound is set between what two checkpoints measured, so that only the denser one held it."""
    settings = {"steps": 24, "checkpoint_every": 4, "validate_every": 4, "gate_learning_rate": 0.5}
    probe = make_trainer(tmp_path / "probe", bound=100.0, **settings)
    seen = []
    validate = probe.validate
    probe.validate = lambda: seen.append(validate()) or seen[-1]
    probe.train()
    assert [result.step for result in seen] == [4, 8, 12, 16, 20, 24]
    assert seen[-1].open_fraction < seen[1].open_fraction
    assert probe.select_weights() == min(seen, key=lambda result: result.open_fraction)

    trainer = make_trainer(tmp_path / "run", bound=100.0, **settings)
    original, calls = trainer.holds_bound, []
    trainer.holds_bound = lambda result: calls.append(result) or (original(result) and result.step <= 8)
    trainer.train()
    kept = {path.name for path in checkpoints(tmp_path / "run")}
    best = min(seen[:2], key=lambda result: result.open_fraction)
    assert kept == {f"checkpoint-{best.step}", "checkpoint-20", "checkpoint-24"}
    assert trainer.select_weights() == best
    assert trainer.validate().constrained == pytest.approx(best.constrained, rel=1e-6)


def test_without_weights_that_held_the_bound_the_last_ones_stay(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, bound=-1.0)
    trainer.train()
    before = weights(trainer)
    assert trainer.select_weights().step == 6
    assert same(before, weights(trainer))


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    original, calls = trainer.batch_objective, 0

    def overflows_in_the_fourth_step(model, input_ids):
        nonlocal calls
        calls += 1
        loss, measured = original(model, input_ids)
        return (loss * float("nan"), measured) if calls == 4 else (loss, measured)

    trainer.batch_objective = overflows_in_the_fourth_step
    with pytest.raises(GossamerError, match="in step 4"):
        trainer.train()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2"]
    assert fault(tmp_path / "checkpoint-2") is None


def test_dropout_is_off_within_and_back_afterwards() -> None:
    model = tiny_model("gpt2").train()
    ids = tokens(1, 9)
    with torch.no_grad(), without_dropout(model):
        assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    with torch.no_grad():
        assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
