"""Record the attention of a run's models on some prompts, as input for the plots.

``attention.json`` is documented in ``docs/metrics.md``.
"""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gossamer.circuits.activation_cache import LinkRecorder
from gossamer.circuits.streams import attention_hooks
from gossamer.errors import GossamerError
from gossamer.files import atomic_write_text
from gossamer.models.vocabulary import require_embeddings

MOST_LINKS = 20_000_000
"""Maximum number of links, open or closed, over all prompts of a record.

In the page, each takes 4/3 bytes for the dense model alone.
"""

LIKELY = 3
"""Number of most likely next tokens recorded at each position."""


@dataclass(frozen=True)
class AttentionPrompt:
    """A prompt that the models are run on.

    Attributes:
        ids: token ids.
        note: short description of the prompt.
    """

    ids: tuple[int, ...]
    note: str


@torch.no_grad()
def attention_of(
    model: PreTrainedModel, ids: Sequence[int]
) -> tuple[Float[Tensor, "layers heads tokens tokens"], Float[Tensor, "tokens vocab"]]:
    """Return the attention weights of one prompt (0 for closed links) and the next-token probabilities."""
    recorder = LinkRecorder()
    rows = torch.tensor([list(ids)], device=model.device)
    with attention_hooks(model, recorder):
        logits = model(input_ids=rows, use_cache=False).logits[0]
    return torch.stack([weights[0] for weights in recorder.weights]).float().cpu(), logits.float().softmax(-1).cpu()


def record_attention(
    models: Mapping[str, PreTrainedModel], tokenizer: PreTrainedTokenizerBase, prompts: Sequence[AttentionPrompt]
) -> dict[str, Any]:
    """Build the attention record of some prompts; the models must be in ``eval()`` mode.

    Raises:
        GossamerError: if the prompts together have more than :data:`MOST_LINKS` links, all of which the page would
            hold; if they contain a token that a model does not know.
    """
    for model in models.values():
        for prompt in prompts:
            require_embeddings(model, tokenizer, torch.tensor(prompt.ids), "the prompt")
    config = next(iter(models.values())).config
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    lengths = [len(prompt.ids) for prompt in prompts]
    links = sum(layers * heads * length * (length + 1) // 2 for length in lengths)
    if links > MOST_LINKS:
        raise GossamerError(
            f"prompts of {' + '.join(map(str, lengths))} tokens have {links:,} links, more than the {MOST_LINKS:,} "
            "that a page can show; give fewer tokens"
        )
    rows = []
    for prompt in prompts:
        found = {name: _of_model(model, tokenizer, prompt.ids) for name, model in models.items()}
        rows.append({"note": prompt.note, "tokens": [tokenizer.decode([i]) for i in prompt.ids], "models": found})
    return {"layers": layers, "heads": heads, "prompts": rows}


def write_attention(
    folder: Path,
    models: Mapping[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[AttentionPrompt],
) -> None:
    """Write ``attention.json`` into a run's folder."""
    atomic_write_text(folder / "attention.json", json.dumps(record_attention(models, tokenizer, prompts)) + "\n")


def _of_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> dict[str, Any]:
    weights, probabilities = attention_of(model, ids)
    tokens = weights.shape[-1]
    query, key = torch.tril_indices(tokens, tokens)
    triangle = weights[:, :, query, key]
    best = probabilities.topk(min(LIKELY, probabilities.shape[-1]), dim=-1)
    likely = [
        [[tokenizer.decode([token]), round(share, 4)] for token, share in zip(*row, strict=True)]
        for row in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
    record: dict[str, Any] = {"next": likely, "open": int((triangle > 0).sum())}
    if record["open"] > triangle.numel() // 8:
        steps = (triangle * 255).round().to(torch.uint8).contiguous()
        record["triangles"] = base64.b64encode(steps.numpy().tobytes()).decode("ascii")
    else:
        places = (weights > 0).nonzero()
        values = weights[tuple(places.T)].tolist()
        record["links"] = [[*place, round(value, 4)] for place, value in zip(places.tolist(), values, strict=True)]
    return record
