"""Whether a model can do a task at all. If it cannot, a circuit for the task explains nothing."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gossamer.circuits.tasks.base import Prompts
from gossamer.errors import GossamerError
from gossamer.models.vocabulary import require_embeddings

ENOUGH = 0.7
"""Minimum share of prompts that a model must answer right before circuits are searched for."""


@dataclass(frozen=True)
class Ability:
    """How well a model does a task.

    Attributes:
        accuracy: share of the prompts whose metric is positive, so that the answers outweigh the wrong ones.
        clean, corrupted: mean metric on the clean and the corrupted prompts, both with the clean prompt's answers.
        prompts: number of prompts.
    """

    accuracy: float
    clean: float
    corrupted: float
    prompts: int


def require_known_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Prompts) -> None:
    """Check that the model has embeddings for all tokens of the prompts and answers.

    Raises:
        GossamerError: naming a token that it lacks.
    """
    for tokens in prompts.kept:
        ids = torch.cat([tokens.clean, tokens.corrupted, tokens.answers, tokens.wrong])
        require_embeddings(model, tokenizer, ids, f"the example {tokens.example.clean!r}")


@torch.no_grad()
def measure_ability(model: PreTrainedModel, prompts: Prompts, *, batch_size: int = 16) -> Ability:
    """Run the model on clean and corrupted prompts, with hard gates if it has gates, and leave it in ``eval()`` mode.

    Raises:
        GossamerError: if a prompt is longer than the model's context.
    """
    longest = getattr(model.config, "max_position_embeddings", None)
    most = max((len(tokens.clean) for tokens in prompts.kept), default=0)
    if longest is not None and most > longest:
        raise GossamerError(f"a prompt of the task has {most} tokens, the model takes {longest}; give shorter ones")
    model.eval()
    clean: list[torch.Tensor] = []
    corrupted: list[torch.Tensor] = []
    for batch in prompts.batches(batch_size):
        for ids, found in ((batch.clean, clean), (batch.corrupted, corrupted)):
            logits = model(input_ids=ids.to(model.device), use_cache=False, logits_to_keep=1).logits
            found.append(batch.measure(logits[:, -1].cpu()))
    metric = torch.cat(clean)
    return Ability(
        (metric > 0).double().mean().item(), metric.mean().item(), torch.cat(corrupted).mean().item(), len(metric)
    )


def require_ability(ability: Ability, task: str, *, forced: bool = False) -> None:
    """Check that the model can do a task.

    Raises:
        GossamerError: with the accuracy and the metrics if it cannot, unless ``forced``.
    """
    if forced or (ability.accuracy >= ENOUGH and ability.clean > ability.corrupted):
        return
    raise GossamerError(
        f"the model cannot do {task}: {100 * ability.accuracy:.0f} % of {ability.prompts} prompts right (at least "
        f"{100 * ENOUGH:.0f} % needed), metric {ability.clean:.3f} on clean and {ability.corrupted:.3f} on corrupted "
        "prompts; --force looks for circuits all the same"
    )
