"""Check gates in a model of an untested family by running it on a few tokens.

With all gates open, the model must compute the same as without gates, on a batch with padding. With hard gates, it
must compute the same with a KV cache as without one. The gates must act in every layer.
"""

import inspect
from typing import Any, cast

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from gossamer.errors import GossamerError
from gossamer.models.attention import counted_links, forced_open
from gossamer.models.structure import attention_modules

_TOKENS, _PADDING, _CACHED = 8, 3, 5


def run_from_cache(model: PreTrainedModel, ids: Int[Tensor, "batch tokens"], first: Any) -> Tensor:
    """Logits of further tokens, given the KV cache of a first pass; transformers is renaming the cache argument."""
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    return cast(Tensor, model(input_ids=ids, use_cache=True, **{name: first[name]}).logits)


class GateProof:
    """Logits of a dense model on a few tokens, to compare with its logits after gates are added.

    Args:
        model: dense, of a supported structure.
    """

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel) -> None:
        random = torch.Generator().manual_seed(0)
        vocabulary = model.get_input_embeddings().weight.shape[0]
        self.ids = torch.randint(vocabulary, (2, _TOKENS), generator=random).to(model.device)
        self.mask = torch.ones_like(self.ids)
        self.mask[1, :_PADDING] = 0
        self.wanted = self._run(model)

    def _run(self, model: PreTrainedModel) -> Tensor:
        training = model.training
        model.eval()
        try:
            logits: Tensor = model(input_ids=self.ids, attention_mask=self.mask, use_cache=False).logits
        finally:
            model.train(training)
        return logits[self.mask.bool()]

    def check(self, model: PreTrainedModel) -> None:
        """Compare with the same model after gates were added.

        Raises:
            GossamerError: naming the family and what differs.
        """
        try:
            self._check(model)
        except GossamerError:
            raise
        except Exception as error:  # the family's code may raise anything
            reason = str(error).strip().splitlines() or [""]
            raise GossamerError(f"{model.config.model_type} does not run with gates: {reason[0]}") from error

    @torch.no_grad()
    def _check(self, model: PreTrainedModel) -> None:
        family, training = model.config.model_type, model.training
        cannot = "it cannot be gated right"
        with forced_open(model), counted_links(model) as counts:
            opened = self._run(model)
        if len(counts) != len(list(attention_modules(model))):
            raise GossamerError(f"{family}: gates act in {len(counts)} of its layers only")
        if not self._near(opened, self.wanted):
            raise GossamerError(f"{family} computes something else when all its gates are open; {cannot}")
        model.eval()
        try:
            whole = model(input_ids=self.ids, use_cache=False).logits
            first = model(input_ids=self.ids[:, :_CACHED], use_cache=True)
            rest = run_from_cache(model, self.ids[:, _CACHED:], first)
        finally:
            model.train(training)
        # In half precision, a gate near its threshold may be open in one run and closed in the other.
        if whole.dtype in (torch.float32, torch.float64) and not self._near(rest, whole[:, _CACHED:]):
            raise GossamerError(f"{family} computes something else from a cache; {cannot}")

    def _near(self, found: Tensor, wanted: Tensor) -> bool:
        limit = max(1e-4, 8 * torch.finfo(wanted.dtype).eps) * max(1.0, float(wanted.abs().max()))
        return bool((found - wanted).abs().max() <= limit)
