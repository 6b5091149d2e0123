"""How far a sparse model holds beyond the length that it was trained at."""

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

    The blocks are cut anew from the part of the run's text that was held out; the validation blocks, which moved lambda
    and chose the checkpoint, may be among them.

    Args:
        run: the run.
        lengths: tokens in a block.
        held_out_tokens: at each length, as far as the held-out text goes; None for about as many as the run's own
            metrics stand on.
        precision: of the forward passes, ``fp32`` or ``bf16``.
        progress: is told in a few words what is being measured.

    Returns:
        The contents of ``metrics.json``, with the list ``lengths``.

    Raises:
        GossamerError: on a length that the model does not take, and if the run has a prompt in every block, so that its
            text has one length only.
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
    # Another seed, so that text from the model itself is not the text that it was trained on.
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
    """Loss, KL and open links on some blocks, as an entry of the list ``lengths`` of ``metrics.json``."""
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
