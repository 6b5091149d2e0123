"""The open fraction of a saved model, recomputed from the definition alone."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from gossamer import GossamerError
from gossamer.evaluation.evaluate import evaluate_run
from gossamer.evaluation.tables import verdict
from gossamer.measures.language import measure_language
from gossamer.models.pretrained import load_dense
from gossamer.runs.job import post_train
from gossamer.runs.record import Run, load_both
from gossamer.runs.settings import RunConfig
from gossamer.training.settings import TrainingConfig


@pytest.fixture(scope="module")
def run(saved_llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    training = TrainingConfig(precision="fp32", batch_size=4, checkpoint_every=0, gate_learning_rate=0.3)
    config = RunConfig(str(saved_llama), str(text), tokens=12 * 64, seq_len=16, held_out_tokens=256, training=training)
    return post_train(config, tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def metrics(run: Run) -> dict:
    return evaluate_run(run)


class _Definition:
    """The gates G = q k^T / sqrt(d) + b > 0 of a llama, inserted layer by layer into transformers' eager attention.

    It reads the saved files with plain transformers and safetensors, and shares no code with gossamer.
    """

    def __init__(self, folder: Path) -> None:
        config = AutoConfig.for_model(**json.loads((folder / "base_config.json").read_text()))
        weights = load_file(folder / "gossamer.safetensors")
        self.biases = [weights.pop(f"model.layers.{i}.self_attn.gate_bias") for i in range(config.num_hidden_layers)]
        self.model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        self.model.load_state_dict(weights, strict=False)
        self.model.eval()
        self.opened = self.allowed = 0

    @torch.no_grad()
    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        inner = self.model.model
        x = inner.embed_tokens(ids)
        batch, length = ids.shape
        cos, sin = inner.rotary_emb(x, torch.arange(length)[None])
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        for layer, bias in zip(inner.layers, self.biases, strict=True):
            attention, h = layer.self_attn, layer.input_layernorm(x)
            d = attention.head_dim
            q, k, v = (p(h).view(batch, length, -1, d).transpose(1, 2)
                       for p in (attention.q_proj, attention.k_proj, attention.v_proj))  # fmt: skip
            q, k = apply_rotary_pos_emb(q, k, cos, sin)
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
            s = q @ k.mT / math.sqrt(d)
            p = torch.softmax(s.masked_fill(~causal, -math.inf), -1)
            a = ((s + bias[:, None, None]) > 0) & causal
            self.opened += int(a.sum())
            self.allowed += int(causal.sum()) * a.shape[0] * a.shape[1]
            x = x + attention.o_proj(((a * p) @ v).transpose(1, 2).flatten(2))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self.model.lm_head(inner.norm(x))


def test_reported_figures_equal_those_of_the_definition(run: Run, metrics: dict) -> None:
    blocks = run.blocks("held_out")
    definition = _Definition(run.model)
    logits = definition(blocks)
    assert definition.opened / definition.allowed == pytest.approx(metrics["open_fraction"], rel=1e-3)
    assert 0.01 < metrics["open_fraction"] < 0.9
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), blocks[:, 1:].flatten())
    assert loss.item() == pytest.approx(metrics["loss_sparse"], rel=1e-4)


def test_metrics_agree_with_one_another(run: Run, metrics: dict) -> None:
    assert json.loads(run.metrics.read_text()) == metrics
    opened, allowed = torch.tensor(metrics["open_links"]), torch.tensor(metrics["allowed_links"])
    assert opened.shape == (3, 4)
    assert metrics["open_fraction"] == pytest.approx((opened.sum() / allowed.sum()).item())
    assert metrics["open_fraction_per_layer"] == pytest.approx((opened.sum(1) / allowed.sum(1)).tolist())
    queries = run.blocks("held_out").numel()
    assert metrics["open_links_per_query"] == pytest.approx(opened.sum().item() / (queries * 12))
    assert allowed[0, 0] == len(run.blocks("held_out")) * 16 * 17 // 2
    assert metrics["tau"] == pytest.approx(metrics["loss_dense"] + 0.01)
    assert metrics["constraint_met"] == (metrics["loss_sparse"] <= metrics["tau"])
    assert metrics["tokens_trained"] == 12 * 4 * 16
    assert ("NOT met" in verdict(metrics)) != metrics["constraint_met"]


def test_damaged_metrics_are_found_before_anything_is_measured(run: Run, metrics: dict) -> None:
    """The file is read first, because keys that others wrote into it are kept."""
    whole = run.metrics.read_text()
    said: list[str] = []
    try:
        for damaged in ("{", json.dumps({**metrics, "loss_dense": "x"})):
            run.metrics.write_text(damaged)
            with pytest.raises(GossamerError, match=r"metrics\.json cannot be used: .*once it is out of the way"):
                evaluate_run(run, progress=said.append)
    finally:
        run.metrics.write_text(whole)
    assert not said


def test_the_error_of_the_difference_is_that_of_each_block(run: Run, metrics: dict) -> None:
    blocks = run.blocks("held_out")
    dense, sparse, _ = load_both(run)
    losses = [[measure_language(model, block).loss for block in blocks.split(1)] for model in (dense, sparse)]
    differences = torch.tensor(losses[1]) - torch.tensor(losses[0])
    error = (differences.std() / math.sqrt(len(blocks))).item()
    assert metrics["loss_difference_stderr"] == metrics["constraint_stderr"] == pytest.approx(error, rel=1e-3)
    assert metrics["blocks_evaluated"] == len(blocks) > 1
    assert metrics["kl_stderr"] > 0


@pytest.mark.parametrize(("over", "told"), [(0.001, True), (-0.001, True), (0.5, False), (-0.5, False)])
def test_the_verdict_says_when_so_little_text_cannot_tell(over: float, told: bool) -> None:
    metrics = {"constraint_label": "loss", "constraint_value": 3.0 + over, "constraint_bound": 3.0,
               "constraint_met": over <= 0}  # fmt: skip
    line = verdict(metrics | {"constraint_stderr": 0.04, "blocks_evaluated": 32})
    assert ("less than two standard errors apart (one is 0.0400 over 32 blocks)" in line) == told
    assert ("NOT met" in line) == (over > 0)
    assert "standard error" not in verdict(metrics | {"constraint_stderr": None})
    assert "standard error" not in verdict(metrics)  # as in a record of an older version


def test_every_key_is_documented(metrics: dict) -> None:
    documented = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    assert [key for key in metrics if f"`{key}`" not in documented] == []


def test_the_control_can_be_sparsified_in_turn(run: Run, metrics: dict, tmp_path: Path) -> None:
    adapted, tokenizer = load_dense(str(run.control))
    assert measure_language(adapted, run.blocks("held_out")).loss == pytest.approx(metrics["loss_dense_control"])
    assert tokenizer.get_vocab() == load_dense(run.dense)[1].get_vocab()
    config = RunConfig(str(run.control), run.config().text, tokens=64, seq_len=16, control=False,
                       training=TrainingConfig(precision="fp32", checkpoint_every=0))  # fmt: skip
    assert post_train(config, tmp_path / "run").record()["measured"]["loss_dense"] > 0
