"""Measure a sparse model at sequence lengths other than its training length."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from gossamer.errors import GossamerError
from gossamer.files import atomic_write_text
from gossamer.measures.language import measure_beside_dense, standard_error
from gossamer.runs.beginning import blocks_of
from gossamer.runs.record import Run, load_sparse
from gossamer.training.settings import TrainingConfig


def add_lengths(
    run: Run,
    lengths: Sequence[int],
    *,
    held_out_tokens: int | None = None,
    precision: str = "fp32",
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure a finished, evaluated run at several sequence lengths and add them to its ``metrics.json``.

    New blocks are cut from the held-out part of the run's text. They may overlap with the validation blocks, which were
    used to adapt lambda and to select the checkpoint.

    Args:
        run: the run.
        lengths: tokens in a block.
        held_out_tokens: tokens to measure at each length, limited by the held-out text; None: about as many as the
            run's other metrics use.
        precision: precision of the forward passes, ``fp32`` or ``bf16``.
        progress: called with a short description of the current step.

    Returns:
        The contents of ``metrics.json``, with the list ``lengths``.

    Raises:
        GossamerError: if the model does not support a length; if every block of the run has a prompt, so that its text
            has one length only.
    """
    config, before = run.config(), run.read_metrics()
    if config.training.prompt_tokens:
        raise GossamerError(
            f"{run.folder} was trained on texts of one length, {config.seq_len} tokens; no other is known"
        )
    run.check_text()
    dense, tokenizer = run.load_dense("cpu")
    _check_lengths(dense, lengths)
    sparse = load_sparse(run)
    dense = dense.to(sparse.device)
    rows = []
    # Use another seed, so that text sampled from the model differs from its training text.
    asked = replace(
        config,
        text=run.text,
        held_out_tokens=config.held_out_tokens if held_out_tokens is None else held_out_tokens,
        training=TrainingConfig(batch_size=1, seed=config.training.seed + 1),
    )
    for length in lengths:
        progress(f"length {length:,}")
        one_block = replace(asked, tokens=length, seq_len=length, validation_tokens=length)
        told = partial(_tell_sampled, progress, length)
        blocks = blocks_of(one_block, dense, tokenizer, told).held_out
        rows.append(measure_at_length(sparse, dense, blocks, precision))
    metrics = {**before, "lengths": rows}
    atomic_write_text(run.metrics, json.dumps(metrics, indent=2) + "\n")
    return metrics


def _check_lengths(dense: PreTrainedModel, lengths: Sequence[int]) -> None:
    longest = getattr(dense.config, "max_position_embeddings", None)
    for length in lengths:
        if length < 2 or (longest is not None and length > longest):
            raise GossamerError(f"length {length} is out of reach; give 2 tokens or more, at most {longest or 'any'}")


def _tell_sampled(progress: Callable[[str], None], length: int, done: int, total: int) -> None:
    progress(f"length {length:,}: {done} of {total} blocks sampled")


def measure_at_length(
    sparse: PreTrainedModel, dense: PreTrainedModel, blocks: Int[Tensor, "blocks tokens"], precision: str
) -> dict[str, Any]:
    """Measure loss, KL and open links on some blocks; return an entry of ``lengths`` in ``metrics.json``."""
    options: dict[str, Any] = {"batch_size": max(1, 2_048 // blocks.shape[1]), "precision": precision}
    sparse_metrics, dense_metrics = measure_beside_dense(sparse, dense, blocks, **options)
    assert sparse_metrics.kls is not None
    return {
        "seq_len": blocks.shape[1],
        "blocks_evaluated": len(blocks),
        "tokens_evaluated": sparse_metrics.tokens,
        "precision": precision,
        "loss_dense": dense_metrics.loss,
        "loss_sparse": sparse_metrics.loss,
        "loss_difference_stderr": standard_error(sparse_metrics.losses - dense_metrics.losses),
        "kl": sparse_metrics.kl,
        "kl_stderr": standard_error(sparse_metrics.kls),
        "open_fraction": sparse_metrics.links.open_fraction,
        "open_links_per_query": sparse_metrics.links.open_links_per_query,
    }
