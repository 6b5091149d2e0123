"""How far a sparse model holds beyond the length that it was trained at."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from gossamer.errors import GossamerError
from gossamer.evaluation.language import measure_language, plus_minus, standard_error
from gossamer.evaluation.sparsity import LinkTally
from gossamer.files import write_text
from gossamer.models.attention import counted_links
from gossamer.models.pretrained import load_dense
from gossamer.tables import Table
from gossamer.training.run import Run, blocks_of, load_sparse
from gossamer.training.trainer import TrainingConfig


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
            figures stand on.
        precision: of the forward passes, ``fp32`` or ``bf16``.
        progress: is told in a few words what is being measured.

    Returns:
        The contents of ``metrics.json``, with the list ``lengths``.

    Raises:
        GossamerError: on a length that the model does not take, and if the run has a prompt in every block, so that its
            text has one length only.
    """
    config = run.config()
    if config.training.prompt_tokens:
        raise GossamerError(
            f"{run.folder} was trained on texts of one length, {config.seq_len} tokens; no other is known"
        )
    dense, tokenizer = load_dense(run.dense)
    longest = getattr(dense.config, "max_position_embeddings", None)
    for length in lengths:
        if length < 2 or (longest is not None and length > longest):
            raise GossamerError(f"length {length} is out of reach; give 2 tokens or more, at most {longest or 'any'}")
    sparse = load_sparse(run)
    dense = dense.to(sparse.device)
    rows = []
    wanted = config.held_out_tokens if held_out_tokens is None else held_out_tokens
    # Another seed, so that text from the model itself is not the text that it was trained on.
    one_block = TrainingConfig(steps=1, batch_size=1, seed=config.training.seed + 1)

    def held_out(length: int) -> Int[Tensor, "blocks tokens"]:
        def sampled(done: int, total: int) -> None:
            progress(f"length {length:,}: {done} of {total} blocks sampled")

        asked = replace(config, seq_len=length, validation_tokens=length, held_out_tokens=wanted, training=one_block)
        return blocks_of(asked, dense, tokenizer, sampled).held_out

    for length in lengths:
        progress(f"length {length:,}")
        rows.append(_at_length(sparse, dense, held_out(length), precision))
    metrics = {**json.loads(run.metrics.read_text()), "lengths": rows}
    write_text(run.metrics, json.dumps(metrics, indent=2) + "\n")
    return metrics


def _at_length(
    sparse: PreTrainedModel, dense: PreTrainedModel, blocks: Int[Tensor, "blocks tokens"], precision: str
) -> dict[str, Any]:
    """One entry of the list ``lengths``."""
    tally = LinkTally.empty(sparse.config.num_hidden_layers, sparse.config.num_attention_heads)
    batch_size = max(1, 2_048 // blocks.shape[1])
    remaining = list(blocks.split(batch_size))
    options: dict[str, Any] = {"batch_size": batch_size, "precision": precision}
    with counted_links(sparse) as counts:

        def count_batch() -> None:
            tally.add(counts, remaining.pop(0).numel())

        figures = measure_language(sparse, blocks, dense=dense, after_batch=count_batch, **options)
    dense_figures = measure_language(dense, blocks, **options)
    assert figures.kls is not None
    return {
        "seq_len": blocks.shape[1],
        "blocks_evaluated": len(blocks),
        "tokens_evaluated": figures.tokens,
        "precision": precision,
        "loss_dense": dense_figures.loss,
        "loss_sparse": figures.loss,
        "loss_difference_stderr": standard_error(figures.losses - dense_figures.losses),
        "kl": figures.kl,
        "kl_stderr": standard_error(figures.kls),
        "open_fraction": tally.open_fraction,
        "open_links_per_query": tally.open_links_per_query,
    }


def lengths_table(metrics: dict[str, Any]) -> Table:
    """What :func:`add_lengths` measured."""
    table = Table(title=f"By length; trained at T = {metrics['seq_len']}")
    headings = ("T", "dense (nat)", "sparse (nat)", "sparse minus dense", "KL (nat)", "open (%)", "links per query")
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in metrics["lengths"]:
        table.add_row(
            f"{row['seq_len']:,}",
            f"{row['loss_dense']:.4f}",
            f"{row['loss_sparse']:.4f}",
            f"{row['loss_sparse'] - row['loss_dense']:+.4f}{plus_minus(row.get('loss_difference_stderr'))}",
            f"{row['kl']:.4f}{plus_minus(row.get('kl_stderr'))}",
            f"{100 * row['open_fraction']:.3f}",
            f"{row['open_links_per_query']:.3f}",
        )
    return table
