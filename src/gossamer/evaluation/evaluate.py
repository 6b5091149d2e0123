"""Measure all metrics of a run and write ``metrics.json``.

The keys are documented in ``docs/metrics.md``.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from gossamer.evaluation.topk import topk_curve
from gossamer.files import atomic_write_text
from gossamer.measures.language import (
    LanguageMetrics,
    measure_beside_dense,
    measure_language,
    standard_error,
)
from gossamer.measures.links import LinkCounter
from gossamer.models.vocabulary import require_embeddings
from gossamer.runs.record import Run, load_control, load_sparse, versions
from gossamer.training.constraints import CONSTRAINTS, Constraint

TOPK = (1, 2, 4, 8, 16, 32, 64)
TOPK_TOKENS = 2_048
"""Approximate number of held-out tokens per point of the top-k curve; at least one block is used."""


def evaluate_run(
    run: Run,
    *,
    precision: str = "fp32",
    batch_size: int = 8,
    topk: tuple[int, ...] = TOPK,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure a finished run on its held-out blocks and write ``metrics.json``.

    Keys of an earlier ``metrics.json`` that are not measured here are kept, for example those of ``gossamer demo``.

    Args:
        run: a finished run.
        precision: precision of the forward passes, ``fp32`` or ``bf16``.
        batch_size: blocks per forward pass.
        topk: points of the top-k curve; only those with k below the sequence length are measured.
        progress: called with a short description of the current step.

    Returns:
        The contents of ``metrics.json``.

    Raises:
        GossamerError: if the run is not finished, or another process is working on it.
    """
    with run.locked():
        return _evaluate(run, precision, batch_size, topk, progress)


def _evaluate(
    run: Run, precision: str, batch_size: int, topk: tuple[int, ...], progress: Callable[[str], None]
) -> dict[str, Any]:
    config, before = run.config(), run.read_metrics()
    blocks = run.blocks("held_out")
    options: dict[str, Any] = {
        "precision": precision,
        "batch_size": batch_size,
        "prompt_tokens": config.training.prompt_tokens,
    }
    progress("loading")
    sparse = load_sparse(run)
    dense, tokenizer = run.load_dense(sparse.device)
    require_embeddings(dense, tokenizer, blocks, str(run.folder / "blocks.safetensors"))
    progress("sparse and dense model")
    sparse_metrics, dense_metrics = measure_beside_dense(sparse, dense, blocks, **options)
    del sparse
    control_loss = None
    if run.control.exists():
        progress("dense control")
        control_loss = measure_language(load_control(run), blocks, **options).loss
    progress("top-k baseline")
    metrics = {
        **_training_facts(run),
        "blocks_evaluated": len(blocks),
        "tokens_evaluated": sparse_metrics.tokens,
        "precision_evaluated": precision,
        **_loss_metrics(sparse_metrics, dense_metrics, control_loss),
        **_constraint_metrics(config.training.constraint, sparse_metrics, dense_metrics),
        **_link_metrics(sparse_metrics.links),
        **_topk_metrics(dense, blocks, topk, options),
        "versions_evaluated": versions(),
    }
    metrics = {**metrics, **{key: value for key, value in before.items() if key not in metrics}}
    atomic_write_text(run.metrics, json.dumps(metrics, indent=2) + "\n")
    return metrics


def _training_facts(run: Run) -> dict[str, Any]:
    config, record = run.config(), run.record()
    selected = record["measured"].get("selected", {})
    return {
        "model": config.model,
        "text": config.text,
        "seq_len": config.seq_len,
        "seed": config.training.seed,
        "tokens_trained": config.tokens_trained,
        "tokens_trained_before": record["measured"].get("tokens_before") or None,
        "selected_step": selected.get("step"),
        "gate_bias_shift": selected.get("calibration"),
        "weight_interpolation": selected.get("interpolation", 1.0),
        "versions_trained": record["versions"],
    }


def _loss_metrics(sparse: LanguageMetrics, dense: LanguageMetrics, control_loss: float | None) -> dict[str, Any]:
    assert sparse.kls is not None
    return {
        "loss_dense": dense.loss,
        "loss_sparse": sparse.loss,
        "loss_difference_stderr": standard_error(sparse.losses - dense.losses),
        "loss_dense_control": control_loss,
        "kl": sparse.kl,
        "kl_stderr": standard_error(sparse.kls),
    }


def _constraint_metrics(constraint: Constraint, sparse: LanguageMetrics, dense: LanguageMetrics) -> dict[str, Any]:
    """The constraint's values and labels, for readers that do not know its type."""
    outcome = constraint.outcome(sparse, dense)
    bounds = {kind.bound_name: None for kind in CONSTRAINTS.values()}
    return {
        "constraint": constraint.name,
        "constraint_symbol": constraint.symbol,
        "constraint_label": constraint.label,
        "constraint_value": outcome.value,
        "constraint_bound": outcome.bound,
        "constraint_stderr": outcome.stderr,
        "constraint_met": outcome.met,
        **bounds,
        constraint.bound_name: outcome.bound,
    }


def _link_metrics(links: LinkCounter) -> dict[str, Any]:
    return {
        "open_fraction": links.open_fraction,
        "open_links_per_query": links.open_links_per_query,
        "open_fraction_per_layer": links.open_fraction_per_layer,
        "open_fraction_per_head": links.open_fraction_per_head,
        "open_links": links.open_links.tolist(),
        "allowed_links": links.allowed_links.tolist(),
    }


def _topk_metrics(
    dense: PreTrainedModel, blocks: Int[Tensor, "blocks tokens"], topk: tuple[int, ...], options: dict[str, Any]
) -> dict[str, Any]:
    """Measure the top-k curve and the dense model's loss on a subset of the blocks."""
    count, seq_len = blocks.shape
    some = blocks[:: math.ceil(count / max(1, TOPK_TOKENS // seq_len))]
    curve = topk_curve(dense, some, tuple(k for k in topk if k < seq_len), **options)
    measured = measure_language(dense, some, **options)
    return {
        "topk": [asdict(point) for point in curve],
        "topk_loss_dense": measured.loss,
        "topk_tokens_evaluated": measured.tokens,
    }
