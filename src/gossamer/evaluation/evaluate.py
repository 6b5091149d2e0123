"""All figures of a run: ``metrics.json`` and the tables that the terminal shows.

The keys are documented in ``docs/metrics.md``.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from gossamer.evaluation.capability import task_table
from gossamer.evaluation.language import measure_language, plus_minus, standard_error
from gossamer.evaluation.sparsity import LinkTally
from gossamer.evaluation.topk import topk_curve
from gossamer.files import write_text
from gossamer.models.attention import counted_links
from gossamer.models.pretrained import load_dense
from gossamer.tables import Table
from gossamer.training.run import Run, load_control, load_sparse, versions

TOPK = (1, 2, 4, 8, 16, 32, 64)
TOPK_TOKENS = 4_096
"""About so many held-out tokens, at least one block, measure each point of the top-k curve."""


def evaluate_run(
    run: Run,
    *,
    precision: str = "fp32",
    batch_size: int = 8,
    topk: tuple[int, ...] = TOPK,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure a finished run on its held-out blocks and write ``metrics.json``.

    Keys of an earlier ``metrics.json`` that are not measured here stay in it: those of ``gossamer demo``.

    Args:
        run: a finished run.
        precision: of the forward passes, ``fp32`` or ``bf16``.
        batch_size: blocks in one forward pass.
        topk: points of the top-k curve; those with k below the sequence length are measured.
        progress: is told in a few words what is being measured.

    Returns:
        The contents of ``metrics.json``.

    Raises:
        GossamerError: if the run is not finished.
    """
    config, record = run.config(), run.record()
    blocks = run.blocks("held_out")
    progress("loading")
    sparse = load_sparse(run)
    dense, _ = load_dense(run.dense)
    dense = dense.to(sparse.device)
    options: dict[str, Any] = {
        "precision": precision,
        "batch_size": batch_size,
        "prompt_tokens": config.training.prompt_tokens,
    }

    progress("sparse model and KL to the dense one")
    tally = LinkTally.empty(sparse.config.num_hidden_layers, sparse.config.num_attention_heads)
    with counted_links(sparse) as counts:
        remaining = list(blocks.split(batch_size))

        def count_batch() -> None:
            tally.add(counts, remaining.pop(0).numel())

        sparse_figures = measure_language(sparse, blocks, dense=dense, after_batch=count_batch, **options)
    del sparse
    progress("dense model")
    dense_figures = measure_language(dense, blocks, **options)
    control_loss = None
    if run.control.exists():
        progress("dense control")
        control = load_control(run)
        control_loss = measure_language(control, blocks, **options).loss
        del control
    progress("top-k baseline")
    wanted = max(1, TOPK_TOKENS // config.seq_len)
    some = blocks[:: math.ceil(len(blocks) / wanted)]
    curve = topk_curve(dense, some, tuple(k for k in topk if k < config.seq_len), **options)

    loss_dense = dense_figures.loss
    tau = config.tau if config.tau is not None else loss_dense + config.slack
    kl, kls = sparse_figures.kl, sparse_figures.kls
    assert kl is not None
    assert kls is not None
    is_ce = config.training.constraint == "ce"
    difference_stderr = standard_error(sparse_figures.losses - dense_figures.losses)
    kl_stderr = standard_error(kls)
    if is_ce:
        constraint_stderr = difference_stderr if config.tau is None else standard_error(sparse_figures.losses)
    else:
        constraint_stderr = kl_stderr
    metrics = {
        "model": config.model,
        "text": config.text,
        "seq_len": config.seq_len,
        "seed": config.training.seed,
        "tokens_trained": config.training.steps * config.tokens_per_step,
        "tokens_trained_before": record["measured"].get("tokens_before") or None,
        "selected_step": record["measured"].get("selected", {}).get("step"),
        "blocks_evaluated": len(blocks),
        "tokens_evaluated": sparse_figures.tokens,
        "precision_evaluated": precision,
        "loss_dense": loss_dense,
        "loss_sparse": sparse_figures.loss,
        "loss_difference_stderr": difference_stderr,
        "loss_dense_control": control_loss,
        "tau": tau,
        "kl": kl,
        "kl_stderr": kl_stderr,
        "constraint": config.training.constraint,
        "epsilon": None if is_ce else config.epsilon,
        "constraint_met": sparse_figures.loss <= tau if is_ce else kl <= config.epsilon,
        "constraint_stderr": constraint_stderr,
        "open_fraction": tally.open_fraction,
        "open_links_per_query": tally.open_links_per_query,
        "open_fraction_per_layer": tally.open_fraction_per_layer,
        "open_fraction_per_head": tally.open_fraction_per_head,
        "open_links": tally.open_links.tolist(),
        "allowed_links": tally.allowed_links.tolist(),
        "topk": [asdict(point) for point in curve],
        "topk_loss_dense": measure_language(dense, some, **options).loss,
        "topk_tokens_evaluated": some.shape[0] * (some.shape[1] - max(1, config.training.prompt_tokens)),
        "versions_trained": record["versions"],
        "versions_evaluated": versions(),
    }
    before = json.loads(run.metrics.read_text()) if run.metrics.exists() else {}
    metrics = {**metrics, **{key: value for key, value in before.items() if key not in metrics}}
    write_text(run.metrics, json.dumps(metrics, indent=2) + "\n")
    return metrics


def summary_tables(metrics: dict[str, Any]) -> list[Table]:
    """The contents of ``metrics.json`` as tables for the terminal."""
    tasks = [task_table(metrics)] if "tasks" in metrics else []
    return [_losses(metrics), _links(metrics), _topk(metrics), *tasks]


def verdict(metrics: dict[str, Any]) -> str:
    """In plain words whether the constraint was met, and whether so much text can tell."""
    if metrics["constraint"] == "ce":
        what, value, bound = "held-out loss", metrics["loss_sparse"], metrics["tau"]
    else:
        what, value, bound = "KL to the dense model", metrics["kl"], metrics["epsilon"]
    said = f"{what} {value:.4f} nat, bound {bound:.4f}"
    said = (
        f"Constraint met: {said}."
        if metrics["constraint_met"]
        else (f"Constraint NOT met: {said}, over by {value - bound:.4f}.")
    )
    error = metrics.get("constraint_stderr")
    if error is None or abs(value - bound) >= 2 * error:
        return said
    return (
        f"{said} The two are less than two standard errors apart (one is {error:.4f} over "
        f"{metrics['blocks_evaluated']:,} blocks): so little text cannot tell."
    )


def _losses(metrics: dict[str, Any]) -> Table:
    table = Table(title=f"Held-out loss, T = {metrics['seq_len']}, {metrics['tokens_evaluated']:,} predictions")
    for heading in ("model", "loss (nat)", "minus dense", "KL from dense (nat)"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    dense = metrics["loss_dense"]
    table.add_row("dense", f"{dense:.4f}", "", "")
    sparse = metrics["loss_sparse"]
    table.add_row(
        "sparse, hard gates",
        f"{sparse:.4f}",
        f"{sparse - dense:+.4f}{plus_minus(metrics.get('loss_difference_stderr'))}",
        f"{metrics['kl']:.4f}{plus_minus(metrics.get('kl_stderr'))}",
    )
    control = metrics["loss_dense_control"]
    if control is not None:
        table.add_row("dense control", f"{control:.4f}", f"{control - dense:+.4f}", "")
    table.add_row("bound tau", f"{metrics['tau']:.4f}", f"{metrics['tau'] - dense:+.4f}", "")
    return table


def _links(metrics: dict[str, Any]) -> Table:
    overall = f"{100 * metrics['open_fraction']:.3f} % open"
    table = Table(title=f"{overall}, {metrics['open_links_per_query']:.3f} open links per query and head")
    table.add_column("layer", justify="right")
    table.add_column("open (%)", justify="right")
    table.add_column("open by head (%)")
    per_head = metrics["open_fraction_per_head"]
    for layer, fraction in enumerate(metrics["open_fraction_per_layer"]):
        heads = " ".join(f"{100 * head:5.2f}" for head in per_head[layer])
        table.add_row(str(layer), f"{100 * fraction:.3f}", heads)
    return table


def _topk(metrics: dict[str, Any]) -> Table:
    table = Table(title=f"Top-k of the dense model, {metrics['topk_tokens_evaluated']:,} predictions")
    for heading in ("k", "open (%)", "loss (nat)", "renormalised (nat)"):
        table.add_column(heading, justify="right")
    plain = {point["k"]: point for point in metrics["topk"] if not point["renormalised"]}
    renormalised = {point["k"]: point for point in metrics["topk"] if point["renormalised"]}
    for k, point in plain.items():
        fraction = f"{100 * point['open_fraction']:.2f}"
        table.add_row(str(k), fraction, f"{point['loss']:.3f}", f"{renormalised[k]['loss']:.3f}")
    return table
