"""Constrained training of tiny models: trained parameters, measurements, and resuming after a stop."""

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
from gossamer.training.checkpoints import checkpoint_error, checkpoints, last_valid_checkpoint
from gossamer.training.constraints import CONSTRAINTS, Constraint, CrossEntropy, KLDivergence
from gossamer.training.data import BlockDataset
from gossamer.training.interpolation import SHARES
from gossamer.training.multiplier import MultiplierConfig
from gossamer.training.settings import TrainingConfig
from gossamer.training.sparsity import SparsityTrainer
from gossamer.training.stream import BlockStream
from gossamer.training.trainer import PostTrainer, freeze_except

BLOCKS = tokens(32, 16)
VALIDATION = tokens(5, 16, seed=1)


def dense_loss(family: str = "llama") -> float:
    with torch.no_grad():
        return cross_entropy(tiny_model(family)(input_ids=VALIDATION).logits, VALIDATION).item()


def make_trainer(
    folder: Path, constraint: Constraint | None = None, family: str = "llama", steps: int = 6, **settings
) -> SparsityTrainer:
    constraint = constraint or CrossEntropy()
    config = TrainingConfig(**{"batch_size": 4, "checkpoint_every": 2, "validations": 2, "precision": "fp32",
                               "learning_rate": 3e-4, **settings, "constraint": constraint})  # fmt: skip
    dense = tiny_model(family)
    model = gossamer.add_gates(dense)
    freeze_except(model, config.train)
    trainer = SparsityTrainer(
        model, dense, dense_loss(family), config, BlockDataset(BLOCKS), VALIDATION, folder, steps=steps
    )
    trainer.prepare(open_gates=False)
    return trainer


def weights(trainer: PostTrainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_training_closes_links(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, CrossEntropy(tau=100.0), steps=40, checkpoint_every=0, gate_learning_rate=0.3)
    trainer.train()
    assert trainer.last["open_fraction"] < 0.1
    assert trainer.multiplier.value == pytest.approx(0.3 * math.exp(-0.5))
    assert (gate_biases(trainer.model) < -0.5).all()


def test_a_bound_out_of_reach_raises_the_multiplier(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, CrossEntropy(tau=-10.0), steps=10, checkpoint_every=0)
    trainer.train()
    assert trainer.multiplier.value == pytest.approx(0.3 * math.exp(0.5 + 6.0))


def test_outside_the_bound_gates_of_a_limited_pace_do_not_close(tmp_path: Path) -> None:
    """The multiplier stays small here, so only the limit keeps the gates open."""
    settings = {
        "steps": 20,
        "checkpoint_every": 0,
        "gate_learning_rate": 0.3,
        "multiplier": MultiplierConfig(1e-4, 0.0, 0.0),
    }
    opened = []
    for rate in (None, 10.0):
        trainer = make_trainer(tmp_path / str(rate), CrossEntropy(tau=-10.0), closing_rate=rate, **settings)
        trainer.train()
        opened.append(trainer.last["open_fraction"])
        assert trainer.last["closing_share"] == (1.0 if rate is None else 0.0)
    assert opened[0] < 0.1
    assert opened[1] > 0.2


@pytest.mark.parametrize("weighting", ["links", "queries"])
def test_a_step_minimises_the_lagrangian(weighting: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, CrossEntropy(tau=0.05), weighting=weighting)
    value, measured = trainer.batch_objective(trainer.model, BLOCKS[:4])
    fraction, multiplier = measured["expected_open_fraction"], trainer.multiplier.value
    assert trainer.reference_fraction == pytest.approx(fraction, rel=0.2)
    wanted = (fraction / trainer.reference_fraction + multiplier * measured["constrained"] / 0.1) / (1 + multiplier)
    assert value.item() == pytest.approx(wanted, rel=1e-5)
    with torch.no_grad():
        dense = cross_entropy(tiny_model("llama")(input_ids=BLOCKS[:4]).logits, BLOCKS[:4]).item()
    beside_dense = measured["constrained"] - dense - (0.05 - dense_loss())
    assert measured["batch_violation"] == pytest.approx(beside_dense / 0.05, rel=1e-4)


def test_a_model_with_every_gate_shut_trains_on(tmp_path: Path) -> None:
    """The expected links underflow to 0, whose logarithm is not finite."""
    trainer = make_trainer(tmp_path, steps=2, checkpoint_every=0)
    with torch.no_grad():
        for module in attention_modules(trainer.model):
            module.gate_bias.fill_(-1e4)
    trainer.prepare(open_gates=False)
    trainer.train()
    assert trainer.last["expected_open_fraction"] == 0
    assert all(value.isfinite().all() for value in weights(trainer).values())


def test_the_teacher_pulls_where_it_is_asked_to(tmp_path: Path) -> None:
    plain = make_trainer(tmp_path / "plain")
    taught = make_trainer(tmp_path / "taught", CrossEntropy(distillation=0.25))
    values = [trainer.batch_objective(trainer.model, BLOCKS[:4])[0].item() for trainer in (plain, taught)]
    with torch.no_grad():
        logits = plain.model(input_ids=BLOCKS[:4]).logits
        kl = kl_divergence(tiny_model("llama")(input_ids=BLOCKS[:4]).logits, logits).item()
        difference = 0.25 * (kl - cross_entropy(logits, BLOCKS[:4]).item())
    share = plain.multiplier.value / plain.unit / (1 + plain.multiplier.value)
    assert values[1] - values[0] == pytest.approx(difference * share, rel=1e-3)


@pytest.mark.parametrize("kind", ["ce", "kl"])
def test_validation_measures_hard_gates_on_the_validation_blocks(kind: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, CONSTRAINTS[kind](), steps=2, checkpoint_every=0, hard_fraction=0.0)
    trainer.train()
    dense = tiny_model("llama")
    with torch.no_grad():
        logits, dense_logits = trainer.model.eval()(input_ids=VALIDATION).logits, dense(input_ids=VALIDATION).logits
    rows = [slice(row, row + 1) for row in range(len(VALIDATION))]
    if kind == "ce":
        values = torch.tensor([cross_entropy(logits[row], VALIDATION[row]) for row in rows])
        spread = values - torch.tensor([cross_entropy(dense_logits[row], VALIDATION[row]) for row in rows])
    else:
        spread = values = torch.tensor([kl_divergence(dense_logits[row], logits[row]) for row in rows])
    assert trainer.last["constrained_held_out"] == pytest.approx(values.mean().item(), rel=1e-5)
    assert trainer.validation_result.stderr == pytest.approx((spread.std() / len(rows) ** 0.5).item(), rel=1e-4)
    assert trainer.last["sampled"] == 1.0
    # Sampled batches carry no information about hard gates.
    assert trainer.running.value == trainer.violation(trainer.validation_result)


def test_training_ends_inside_its_bound_or_says_that_no_shift_helps(tmp_path: Path) -> None:
    """Untrained, closed gates cost KL and open ones do not, so a shift of the biases meets any bound."""
    trainer = make_trainer(tmp_path, KLDivergence(epsilon=1e-4), steps=1, checkpoint_every=0, learning_rate=0.0,
                           gate_learning_rate=0.0)  # fmt: skip
    before = gate_biases(trainer.model)
    trainer.train()
    assert trainer.violation(trainer.validation_result) > 0
    final = trainer.calibrate()
    assert trainer.violation(final) <= 0
    assert final == trainer.validation_result
    torch.testing.assert_close(gate_biases(trainer.model), before + final.calibration)
    assert trainer.validate().constrained == pytest.approx(final.constrained)

    out_of_reach = make_trainer(tmp_path, CrossEntropy(tau=0.01), steps=1, checkpoint_every=0)
    out_of_reach.train()
    before = weights(out_of_reach)
    assert out_of_reach.calibrate().calibration is None
    assert same(before, weights(out_of_reach))


def test_weights_that_cost_more_than_the_bound_are_drawn_towards_the_dense_ones(tmp_path: Path) -> None:
    """At this learning rate, opening every gate again leaves the weights outside the bound."""
    trainer = make_trainer(tmp_path, KLDivergence(epsilon=1e-4), checkpoint_every=0, learning_rate=0.03, train="all")
    trainer.train()
    before = weights(trainer)
    assert trainer.calibrate().calibration is None
    assert same(before, weights(trainer))

    trainer.dense_weights = lambda: tiny_model("llama").state_dict()
    trained = trainer.model.lm_head.weight.detach().clone()
    final = trainer.calibrate()
    assert trainer.violation(final) <= 0
    assert final.interpolation in SHARES
    assert trainer.validate().constrained == pytest.approx(final.constrained)
    start = tiny_model("llama").lm_head.weight
    torch.testing.assert_close(trainer.model.lm_head.weight, start.lerp(trained, final.interpolation))


def test_weights_come_back_where_the_dense_ones_do_not_hold_the_bound_either(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, CrossEntropy(tau=0.01), steps=1, checkpoint_every=0, train="all")
    trainer.dense_weights = lambda: tiny_model("llama").state_dict()
    trainer.train()
    before = weights(trainer)
    final = trainer.calibrate()
    assert (final.calibration, final.interpolation) == (None, 1.0)
    assert same(before, weights(trainer))


def test_the_start_is_one_unit_outside_the_bound(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, KLDivergence(epsilon=2e-4))
    trainer.prepare(open_gates=True)
    found = trainer.validate().constrained
    assert found <= 4e-4
    assert gate_biases(trainer.model).std() > 0  # each head has its own bias
    with torch.no_grad():
        for module in attention_modules(trainer.model):
            module.gate_bias -= 0.25
    assert trainer.validate().constrained > found


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
    model = gossamer.add_gates(dense)
    add_adapters(model, rank=2, alpha=4.0)
    for module in attention_modules(model):
        module.gate_bias.requires_grad_(True)
    config = TrainingConfig(train="lora", batch_size=4, checkpoint_every=0, precision="fp32")
    before = {n: p.clone() for n, p in model.named_parameters()}
    trainer = SparsityTrainer(model, None, dense_loss(), config, BlockDataset(BLOCKS), VALIDATION, tmp_path, steps=3)
    trainer.prepare(open_gates=True)
    trainer.train()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved
    assert all("lora_" in name or "gate_bias" in name for name in moved)
    model.eval()
    with torch.no_grad():
        wanted = model(input_ids=tokens(1, 9)).logits
        merge_adapters(model)
        torch.testing.assert_close(model(input_ids=tokens(1, 9)).logits, wanted, rtol=1e-4, atol=1e-4)
    assert set(model.state_dict()) == set(gossamer.add_gates(dense).state_dict())


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(tmp_path: Path) -> None:
    runs = []
    for seed in (0, 0, 1):
        trainer = make_trainer(tmp_path / str(len(runs)), seed=seed, checkpoint_every=0)
        trainer.train()
        runs.append(weights(trainer))
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])


@pytest.mark.parametrize(
    "settings", [{}, {"gradient_accumulation": 2, "batch_size": 2}, {"steps": 20}, {"closing_rate": 10.0}]
)
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
    checkpoint, faults = last_valid_checkpoint(tmp_path / "stopped")
    assert checkpoint.name == "checkpoint-2"
    assert not faults
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert same(weights(whole), weights(resumed))
    assert resumed.multiplier.state_dict() == whole.multiplier.state_dict()
    assert resumed.pace.state_dict() == whole.pace.state_dict()
    assert resumed.validation_result == whole.validation_result


def test_resuming_a_stream_from_its_last_checkpoint_trains_no_further(text: Path, tokenizer, tmp_path: Path) -> None:
    def trainer() -> SparsityTrainer:
        made = make_trainer(tmp_path / "run", steps=4, validations=1)
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
    """Hard gates have no noise that could differ, and the mean over equal batches is the mean over all."""
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
    assert all(checkpoint_error(path) is None for path in checkpoints(tmp_path))
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
    checkpoint, faults = last_valid_checkpoint(tmp_path)
    assert checkpoint.name == "checkpoint-4"
    assert len(faults) == 1
    assert message in faults[0]


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
    assert checkpoint_error(tmp_path / "checkpoint-2") is None


def test_a_sparser_checkpoint_that_held_the_bound_is_taken(tmp_path: Path) -> None:
    """The checkpoints at steps 8 and 16 are made to meet the bound, and the last weights to miss it."""
    settings = {"steps": 24, "checkpoint_every": 4, "validations": 6, "gate_learning_rate": 0.5}
    trainer = make_trainer(tmp_path, CrossEntropy(tau=100.0), **settings)
    trainer.violation = lambda result: -1.0 if result.step in (8, 16) else 1.0
    seen, validate = [], trainer.validate
    trainer.validate = lambda: seen.append(validate()) or seen[-1]
    trainer.train()
    best = min((result for result in seen if result.step in (8, 16)), key=lambda result: result.open_fraction)
    kept = {path.name for path in checkpoints(tmp_path)}
    assert kept == {f"checkpoint-{best.step}", "checkpoint-20", "checkpoint-24"}
    final = trainer.select_weights()
    assert (final.step, final.constrained, final.calibration) == (best.step, best.constrained, 0.0)
    assert validate().constrained == pytest.approx(best.constrained, rel=1e-6)


def test_the_last_weights_stay_where_no_sparser_ones_held_the_bound(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, CrossEntropy(tau=100.0), checkpoint_every=3)
    trainer.train()
    before = weights(trainer)
    assert trainer.select_weights().step == 6
    assert same(before, weights(trainer))
