"""The prediction to explain: a prompt, the token after it, and the metric."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gossamer.errors import GossamerError
from gossamer.models.convert import is_gated
from gossamer.models.tokenizers import prompt_ids
from gossamer.models.vocabulary import require_embeddings

MOST_TOKENS, MOST_TOKENS_DENSE = 1_024, 256
"""Most tokens of a prompt; fewer in a dense model, which needs a mask for every pair of tokens in every head."""


@dataclass(frozen=True)
class Prediction:
    """A prompt and the token whose prediction is explained.

    Attributes:
        ids: the prompt's tokens.
        target: the token that follows.
        against: the token that the target is compared with, or None.
    """

    ids: tuple[int, ...]
    target: int
    against: int | None = None

    @property
    def metric_name(self) -> str:
        """Name of the quantity that :meth:`metric` computes."""
        return "log-probability" if self.against is None else "logit difference"

    def metric(self, logits: Float[Tensor, "rows vocab"]) -> Float[Tensor, " rows"]:
        """log p(target) in nats, or logit(target) - logit(against), from the logits at the last position."""
        logits = logits.float()
        if self.against is None:
            return logits.log_softmax(-1)[:, self.target]
        return logits[:, self.target] - logits[:, self.against]


def predict(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    target: str | None = None,
    against: str | None = None,
) -> Prediction:
    """Build a prediction from texts.

    Args:
        model: dense or gated.
        tokenizer: of the model.
        prompt: text.
        target: text of one token; the model's most likely token if None.
        against: text of another token.

    Raises:
        GossamerError: if the prompt is empty or too long, or a target is not a single token that the model knows.
    """
    ids = prompt_tokens(model, tokenizer, prompt, "the prompt")
    chosen = first_choice(model, ids) if target is None else single_token(tokenizer, target, "--target")
    other = None if against is None else single_token(tokenizer, against, "--against")
    if chosen == other:
        raise GossamerError(f"--against {against!r} is the target itself; give another token")
    found = Prediction(ids, chosen, other)
    named = torch.tensor([token for token in (chosen, other) if token is not None])
    require_embeddings(model, tokenizer, named, "the target")
    return found


def prompt_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, name: str
) -> tuple[int, ...]:
    """The tokens of a prompt, including the special tokens that the tokenizer adds.

    Raises:
        GossamerError: if there are no tokens, or more than can be explained; if the model has no embedding for one.
    """
    ids = tuple(prompt_ids(tokenizer, prompt))
    if not prompt.strip() or not ids:
        raise GossamerError(f"{name} is empty; give some words")
    context = getattr(model.config, "max_position_embeddings", None) or MOST_TOKENS
    gated = is_gated(model)
    most = min(context, MOST_TOKENS if gated else MOST_TOKENS_DENSE)
    if len(ids) > most:
        of = "the model's context" if most == context else f"what a {'sparse' if gated else 'dense'} model can explain"
        raise GossamerError(f"{name} has {len(ids):,} tokens, more than {of}, {most:,}; give a shorter one")
    require_embeddings(model, tokenizer, torch.tensor(ids), name)
    return ids


@torch.no_grad()
def first_choice(model: PreTrainedModel, ids: tuple[int, ...]) -> int:
    """The model's most likely token after a prompt."""
    rows = torch.tensor([ids], device=model.device)
    return int(model(input_ids=rows, use_cache=False, logits_to_keep=1).logits[0, -1].argmax())


def single_token(tokenizer: PreTrainedTokenizerBase, text: str, name: str) -> int:
    """The id of a text that is a single token.

    Raises:
        GossamerError: if the text is no token, several tokens, or unknown to the tokenizer.
    """
    ids = tokenizer(text, add_special_tokens=False).input_ids
    if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
        return int(ids[0])
    if not ids:
        raise GossamerError(f"{name} is empty; give one token")
    if ids[0] == tokenizer.unk_token_id:
        raise GossamerError(f"{name} {text!r} is unknown to the tokenizer; give a token of its vocabulary")
    pieces = ", ".join(repr(tokenizer.decode([token])) for token in ids)
    spaced = tokenizer(" " + text.strip(), add_special_tokens=False).input_ids
    hint = f"give one, for example {' ' + text.strip()!r}" if len(spaced) == 1 else "give one, for example the first"
    raise GossamerError(f"{name} {text!r} is {len(ids)} tokens ({pieces}); {hint}")
