"""The metric of one prompt under masks on its attention links.

    f(E)     = (m(E) - m(nothing)) / (m(everything) - m(nothing))     share of the metric left with links outside E cut
    f(not E) = the same with the links of E cut and all others kept

Attention weights and gates are recomputed under every mask. A cut link carries nothing or, with a corrupted prompt,
what it carries there.

The links that have a mask are those that are open on the prompt or on the corrupted prompt, if there is one; in a dense
model, all links. A link that opens only because others are cut counts as outside E.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from gossamer.circuits.activation_cache import LinkRecorder
from gossamer.circuits.mask_search import MaskRow
from gossamer.circuits.positions import (
    EarlierRun,
    UnknownArgumentError,
    changed_positions,
    only_positions,
    recorded_streams,
)
from gossamer.circuits.streams import Pattern, StreamHooks, attention_hooks
from gossamer.errors import GossamerError
from gossamer.ops.weights import causal_pairs

SMALLEST_DIFFERENCE = 1e-3
"""In units of the metric, between all links and none; below it there is nothing to explain."""

_TOKENS_AT_ONCE = 1_024
"""Maximum of rows times tokens in one forward pass without gradients."""

_GRADED_TOKENS = 256
"""Maximum of rows times tokens in one pass with gradients."""

_NARROWED = 0.8
"""Maximum share of the positions of all layers that a narrowed pass computes; otherwise it computes all."""

_RECOMPUTED = 256
"""Number of tokens above which the backward pass recomputes attention, whose weights then dominate memory."""


class PromptMetric(Protocol):
    """A prompt and a metric at its last position."""

    @property
    def ids(self) -> tuple[int, ...]:
        """The prompt's tokens."""
        ...

    @property
    def metric_name(self) -> str:
        """Name of the quantity that :meth:`metric` computes."""
        ...

    def metric(self, logits: Float[Tensor, "rows vocab"]) -> Float[Tensor, " rows"]:
        """Compute the metric from logits at the last position, one row per mask."""
        ...


@dataclass
class _Recorder(LinkRecorder):
    """Records which links of a prompt carry something and, with ``links``, what they carry."""

    carrying: list[Bool[Tensor, "heads tokens tokens"]] = field(default_factory=list)

    def keep(self, weights: Tensor, values: Tensor) -> None:
        self.carrying.append(weights[0] > 0)
        super().keep(weights, values)


@dataclass
class _Masked(StreamHooks):
    """Attention with a separate mask for each row.

    Attributes:
        links: ``[links, 4]`` of each layer that have a mask.
        rows: the masks.
        corrupted: what cut links carry, if not nothing.
        computed: the positions that each layer computes; None: all.
        earlier: keys and values of the other positions.
    """

    links: Sequence[Int[Tensor, "own 4"]]
    rows: list[MaskRow]
    corrupted: _Recorder | None
    computed: list[Int[Tensor, " computed"]] | None = None
    earlier: EarlierRun = field(default_factory=EarlierRun)
    offsets: list[int] = field(init=False)

    def __post_init__(self) -> None:
        ends = torch.tensor([len(own) for own in self.links]).cumsum(0).tolist()
        self.offsets = [0, *ends]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> Tensor:
        if self.computed is None:
            positions = torch.arange(q.shape[2], device=q.device)
        else:
            positions, tokens = self.computed[layer], self.earlier.keys[layer].shape[2]
            allowed = causal_pairs(tokens, tokens, q.device) if pattern.mask is None else pattern.mask
            pattern.mask = allowed[..., positions, :]
            k = self.earlier.keys[layer].expand(len(k), -1, -1, -1).index_copy(2, positions, k)
            v = self.earlier.values[layer].expand(len(v), -1, -1, -1).index_copy(2, positions, v)
        inside, places = self._places(layer, positions, k.shape[2])
        masks = torch.stack([row.mask[self.offsets[layer] : self.offsets[layer + 1]][inside] for row in self.rows])
        arguments = (layer, q, k, v, masks, positions, places, pattern)
        if torch.is_grad_enabled() and k.shape[2] > _RECOMPUTED:
            return checkpoint(self._attend, *arguments, use_reentrant=False)
        return self._attend(*arguments)

    def _places(self, layer: int, positions: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """The layer's links whose query it computes, and where they are in ``[heads, positions, tokens]``."""
        _, heads, queries, keys = self.links[layer].T
        at = positions.new_full((tokens,), -1)
        at[positions] = torch.arange(len(positions), device=positions.device)
        inside = (at[queries] >= 0).nonzero()[:, 0]
        return inside, (heads[inside] * len(positions) + at[queries[inside]]) * tokens + keys[inside]

    def _attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        masks: Tensor,
        positions: Tensor,
        places: Tensor,
        pattern: Pattern,
    ) -> Tensor:
        weights = pattern(q, k)
        rest = torch.tensor([float(row.others_kept) for row in self.rows], device=q.device, dtype=weights.dtype)
        everywhere = rest[:, None].expand(-1, weights[0].numel())
        kept = everywhere.index_copy(1, places, masks.to(weights)).view_as(weights)
        output = (weights * kept) @ v
        if self.corrupted is not None:
            carried = self.corrupted.weights[layer][:, :, positions] * (1 - kept)
            output = output + carried @ self.corrupted.values[layer]
        return output


@dataclass
class _KeyRecorder(_Masked):
    """Records the keys and values of each layer."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> Tensor:
        self.earlier.keys.append(k)
        self.earlier.values.append(v)
        return super().attend(layer, q, k, v, pattern)


class LinkMasks:
    """A prompt, its links, and the metric under masks on them.

    Args:
        model: dense or gated, in ``eval()`` mode, its weights frozen.
        prompt: the prompt and its metric.
        corrupted: tokens of a prompt of the same length whose values cut links carry; None if they carry nothing.

    Attributes:
        links: ``[links, 4]``: layer, head, query position and key position of the links that have a mask.
        full, nothing: the metric with every link and with none.

    Raises:
        GossamerError: if the corrupted prompt has another length; if cutting every link changes nothing.
    """

    def __init__(self, model: PreTrainedModel, prompt: PromptMetric, corrupted: tuple[int, ...] | None = None) -> None:
        self.model, self.prompt = model, prompt
        self.ids = torch.tensor([prompt.ids], device=model.device)
        tokens = len(prompt.ids)
        self.corrupted: _Recorder | None = None
        candidates = torch.stack(self._record(prompt.ids, links=False).carrying)
        if corrupted is not None:
            if len(corrupted) != tokens:
                raise GossamerError(
                    f"--corrupted has {len(corrupted)} tokens and the prompt {tokens}; give prompts of equal length"
                )
            self.corrupted = self._record(corrupted, links=True)
            candidates |= torch.stack(self.corrupted.carrying)
        self.links: Int[Tensor, "links 4"] = candidates.nonzero()
        self._by_layer = self.links.split(candidates.flatten(1).sum(1).tolist())
        self._cells = (self.links[:, 0] * tokens + self.links[:, 2]).cpu()  # layer and query position of each link
        self._narrow = True
        self.full, self.nothing, self._earlier = self._references()
        if abs(self.full - self.nothing) < SMALLEST_DIFFERENCE:
            raise GossamerError(
                f"the {prompt.metric_name} is {self.full:.3f} with every attention link and {self.nothing:.3f} "
                "with none: it does not depend on the links; give another prompt or target"
            )

    @torch.no_grad()
    def _record(self, ids: tuple[int, ...], *, links: bool) -> _Recorder:
        recorder = _Recorder(links)
        with attention_hooks(self.model, recorder):
            self.model(input_ids=torch.tensor([ids], device=self.model.device), use_cache=False, logits_to_keep=1)
        return recorder

    def __len__(self) -> int:
        return len(self.links)

    @torch.no_grad()
    def _references(self) -> tuple[float, float, dict[bool, EarlierRun]]:
        """The metric with all links and with none, and what these two runs left at each layer."""
        none = torch.zeros(len(self.links), device=self.model.device)
        metrics, earlier = [], {}
        for kept in (True, False):
            hooks = _KeyRecorder(self._by_layer, [MaskRow(none + kept, kept)], self.corrupted)
            with recorded_streams(self.model, hooks.earlier.streams):
                metrics.append(self._run(hooks).item())
            earlier[kept] = hooks.earlier
        return metrics[0], metrics[1], earlier

    def metrics(self, rows: list[MaskRow]) -> Float[Tensor, " rows"]:
        """The metric under each mask; differentiable with respect to the masks.

        Rows that cut few links and rows that keep few run separately: each layer computes only the positions that
        differ from the run with all links, or with none, and matter for the prediction.
        """
        found: dict[int, Tensor] = {}
        for kept in {row.others_kept for row in rows}:
            places = [at for at, row in enumerate(rows) if row.others_kept == kept]
            found.update(zip(places, self._metrics([rows[at] for at in places], kept), strict=True))
        return torch.stack([found[at] for at in range(len(rows))])

    def _metrics(self, rows: list[MaskRow], kept: bool) -> Float[Tensor, " rows"]:
        if self._narrow:
            graded = [row.graded for row in rows if row.graded is not None]
            chosen = torch.stack([row.mask.detach() != float(kept) for row in rows]).any(0).cpu()
            changed = torch.zeros(len(self._by_layer), self.ids.shape[1], dtype=torch.bool)
            changed.view(-1)[self._cells[torch.stack([chosen, *graded]).any(0)]] = True
            computed = [each.to(self.ids.device) for each in changed_positions(changed, spreads=kept)]
            if sum(len(each) for each in computed) <= _NARROWED * changed.numel():
                hooks = _Masked(self._by_layer, rows, self.corrupted, computed, self._earlier[kept])
                try:
                    with only_positions(self.model, computed, hooks.earlier):
                        return self._run(hooks)
                except UnknownArgumentError:
                    self._narrow = False
        return self._run(_Masked(self._by_layer, rows, self.corrupted))

    def _run(self, hooks: _Masked) -> Float[Tensor, " rows"]:
        with attention_hooks(self.model, hooks):
            ids = self.ids.expand(len(hooks.rows), -1)
            logits = self.model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1]
        return self.prompt.metric(logits)

    @property
    def rows_with_gradients(self) -> int:
        """Approximate number of masks per pass with gradients."""
        return max(1, _GRADED_TOKENS // self.ids.shape[1])

    def shares(self, rows: list[MaskRow]) -> Float[Tensor, " rows"]:
        """f under each mask; differentiable with respect to the masks."""
        return self.share(self.metrics(rows))

    def reaching(self, chosen: Bool[Tensor, " links"]) -> Bool[Tensor, " links"]:
        """The chosen links from which a path of chosen links leads to the prediction at the last position."""
        links = self.links.cpu()
        read = torch.zeros(self.ids.shape[1], dtype=torch.bool)
        read[-1] = True
        reaching = torch.zeros_like(chosen)
        for layer in range(int(links[:, 0].max()), -1, -1):
            own = chosen & (links[:, 0] == layer) & read[links[:, 2]]
            reaching |= own
            read[links[own, 3]] = True
        return reaching

    def share(self, metrics: Float[Tensor, " rows"]) -> Float[Tensor, " rows"]:
        """f: the share of m(everything) - m(nothing) that is left."""
        return (metrics - self.nothing) / (self.full - self.nothing)

    @torch.no_grad()
    def kept(self, sets: list[Bool[Tensor, " links"]]) -> Float[Tensor, " sets"]:
        """Measure f(E) of several sets of links, batched in as few passes as memory allows."""
        return self._measured([MaskRow(each.float(), False) for each in sets])

    @torch.no_grad()
    def left_when_cut(self, sets: list[Bool[Tensor, " links"]]) -> Float[Tensor, " sets"]:
        """Measure f(not E) of several sets of links."""
        return self._measured([MaskRow(1 - each.float(), True) for each in sets])

    def _measured(self, rows: list[MaskRow]) -> Float[Tensor, " rows"]:
        at_once = max(1, _TOKENS_AT_ONCE // self.ids.shape[1])
        found = [self.metrics(rows[at : at + at_once]) for at in range(0, len(rows), at_once)]
        return self.share(torch.cat(found)).cpu()
