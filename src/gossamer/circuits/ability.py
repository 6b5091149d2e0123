"""Whether a model can do a task at all; a circuit of what it cannot do explains nothing."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gossamer.circuits.tasks.base import Prompts
from gossamer.errors import GossamerError
from gossamer.models.vocabulary import require_embeddings

ENOUGH = 0.7
"""Share of the prompts that a model has to answer right before circuits of it are looked for."""


@dataclass(frozen=True)
class Ability:
    """How well a model does a task.

    Attributes:
        accuracy: share of the prompts whose metric is positive: the answers outweigh the wrong ones.
        clean, corrupted: mean metric on the prompts of either kind, with the answers of the clean one.
        prompts: how many there were.
    """

    accuracy: float
    clean: float
    corrupted: float
    prompts: int


def require_known_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Prompts) -> None:
    """Refuse prompts and answers with tokens that the model has no embedding for.

    Raises:
        GossamerError: naming such a token.
    """
    for tokens in prompts.kept:
        ids = torch.cat([tokens.clean, tokens.corrupted, tokens.answers, tokens.wrong])
        require_embeddings(model, tokenizer, ids, f"the example {tokens.example.clean!r}")


@torch.no_grad()
def measure_ability(model: PreTrainedModel, prompts: Prompts, *, batch_size: int = 16) -> Ability:
    """Run the model on both kinds of prompts, with hard gates if it has any; it is left in ``eval()`` mode.

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
    """Refuse a task that the model cannot do.

    Raises:
        GossamerError: with the accuracy and the metrics, unless ``forced``.
    """
    if forced or (ability.accuracy >= ENOUGH and ability.clean > ability.corrupted):
        return
    raise GossamerError(
        f"the model cannot do {task}: {100 * ability.accuracy:.0f} % of {ability.prompts} prompts right (at least "
        f"{100 * ENOUGH:.0f} % needed), metric {ability.clean:.3f} on clean and {ability.corrupted:.3f} on corrupted "
        "prompts; --force looks for circuits all the same"
    )
