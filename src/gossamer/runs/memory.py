"""Minimum memory of a run, checked before anything large is allocated.

This is a lower bound, not an estimate (see :mod:`gossamer.runs.plan`): every run needs the token blocks, and the logits
of one forward pass with their gradient.
"""

import os
from pathlib import Path

import torch
from transformers import PreTrainedModel

from gossamer.errors import GossamerError
from gossamer.names import SELF
from gossamer.runs.settings import RunConfig

_GIB = 2**30

BLOCK_BYTES = 12
"""Bytes per token in the blocks: 8 in memory, and 4 for the copy that is written."""

LOGIT_BYTES = 8
"""Bytes per logit: itself and its gradient, in float32."""


def machine_memory() -> int:
    """Get the memory available to this process in bytes: the machine's, or its control group's limit if lower."""
    most = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    try:
        return min(most, int(limit.read_text()))
    except (OSError, ValueError):  # no limit
        return most


def require_memory(config: RunConfig, model: PreTrainedModel) -> None:
    """Raise if a run cannot fit into memory.

    Raises:
        GossamerError: naming the setting, the memory it needs, the available memory, and a value that fits.
    """
    training, here = config.training, machine_memory()
    drawn = config.held_out_tokens + config.validation_tokens if config.text == SELF else 0
    asked = drawn + (0 if config.stream else config.tokens_trained)
    room, step = here // BLOCK_BYTES, config.tokens_per_step
    if asked > room:
        needs = f"{BLOCK_BYTES * asked / _GIB:,.0f} GiB as blocks, and this machine has {here / _GIB:,.0f}"
        if not config.stream and step > max(room, config.tokens):
            raise GossamerError(
                f"one step of batch_size {training.batch_size:,} and gradient_accumulation "
                f"{training.gradient_accumulation:,} takes {step:,} tokens, {needs}: give at most "
                f"{room // config.seq_len:,} blocks a step"
            )
        stream = "" if drawn or config.stream else ", or --stream"
        raise GossamerError(f"{asked:,} tokens take {needs}: give at most --tokens {room:,}{stream}")
    device = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else here
    each = LOGIT_BYTES * config.seq_len * model.config.get_text_config().vocab_size
    if (needed := each * training.batch_size) > device:
        fits = int(device // each)
        raise GossamerError(
            f"--batch-size {training.batch_size:,} needs {needed / _GIB:,.0f} GiB for the logits alone, and there are "
            f"{device / _GIB:,.0f}: give at most --batch-size {max(1, fits):,}"
            + ("" if fits else f" and --seq-len {config.seq_len * device // each:,}")
        )
