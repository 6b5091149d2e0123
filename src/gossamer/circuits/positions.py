"""Run each layer of a model only at the positions that differ from an earlier run and matter for the last position.

With most attention links cut, a position into which no kept link leads carries the same at every layer as when all
links are cut. It need not be computed again: its part of the residual stream, its keys and its values are those of the
run without links. The same holds for the positions before the first cut link, compared with the run with all links.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from gossamer.models.architectures import architecture_of


@dataclass
class EarlierRun:
    """What a run of one prompt left at each layer.

    Attributes:
        streams: the residual stream that the layer reads, by layer.
        keys, values: of the layer's attention, positions applied, repeated for each query head.
    """

    streams: list[Float[Tensor, "1 tokens d_model"]] = field(default_factory=list)
    keys: list[Float[Tensor, "1 heads tokens d_key"]] = field(default_factory=list)
    values: list[Float[Tensor, "1 heads tokens d_value"]] = field(default_factory=list)


class UnknownArgumentError(Exception):
    """A layer receives a tensor from which it is not known how to select positions."""


def changed_positions(changed: Bool[Tensor, "layers tokens"], *, spreads: bool) -> list[Int[Tensor, " computed"]]:
    """Return the positions that each layer has to compute for the last position's output; at least one per layer.

    Args:
        changed: whether links of a query position differ from those of the earlier run, by layer.
        spreads: whether a position also differs as soon as an earlier position does: its links to it are kept. If
            False, a position whose own links do not change has no links.
    """
    layers, tokens = changed.shape
    differs = torch.zeros(
        layers + 1, tokens, dtype=torch.bool
    )  # where layer l reads; at the end, where the last writes
    for layer in range(layers):
        read = differs[layer].cumsum(0) > 0 if spreads else differs[layer]
        differs[layer + 1] = read | changed[layer]
    last = torch.arange(tokens) == tokens - 1
    wanted, found = last, []
    for layer in range(layers - 1, -1, -1):
        reading = wanted if spreads else wanted & changed[layer]
        read = differs[layer] & (reading.flip(0).cumsum(0).flip(0) > 0)  # up to the last position that reads
        computed = (wanted & differs[layer + 1]) | read
        found.append((computed if computed.any() else last).nonzero()[:, 0])
        wanted = computed & differs[layer]
    return found[::-1]


@contextmanager
def recorded_streams(model: PreTrainedModel, streams: list[Tensor]) -> Iterator[None]:
    """Context manager in which a forward pass appends what each layer reads: ``[batch, tokens, d_model]``."""

    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        streams.append((args[0] if args else kwargs["hidden_states"]).detach())

    with ExitStack() as stack:
        for layer in model.get_submodule(architecture_of(model).layers):
            stack.callback(layer.register_forward_pre_hook(record, with_kwargs=True).remove)
        yield


@contextmanager
def only_positions(
    model: PreTrainedModel, positions: Sequence[Int[Tensor, " computed"]], earlier: EarlierRun
) -> Iterator[None]:
    """Context manager in which layer l computes only ``positions[l]``; it reads all others from an earlier run.

    The queries, keys and values that attention gets are those of ``positions[l]``; keys and values of all other
    positions have to be added there. Rows must not be padded, and no cache may be used. Only the logits of the last
    position are the model's.

    Args:
        model: the model.
        positions: for each layer, ascending, on the model's device; the last one includes the last position.
        earlier: the earlier run.

    Raises:
        UnknownArgumentError: in the forward pass, if a layer has a tensor among its arguments besides the residual
            stream, rotary positions, position ids and the attention mask.
    """
    layers = list(model.get_submodule(architecture_of(model).layers))
    with ExitStack() as stack:
        selections = [
            _Select(own, before, stream)
            for own, before, stream in zip(positions, [None, *positions[:-1]], earlier.streams, strict=True)
        ]
        for layer, selection in zip(layers, selections, strict=True):
            stack.callback(layer.register_forward_pre_hook(selection, with_kwargs=True).remove)
        restoration = _Restore(earlier.streams[0].shape[1], positions[-1])
        stack.callback(layers[-1].register_forward_hook(restoration).remove)
        yield


class _Select:
    """Forward pre-hook of a layer that selects positions in its arguments.

    Args:
        own: positions that the layer computes.
        before: positions that the layer before computes; None: all.
        stream: what the layer reads in the earlier run.
    """

    def __init__(self, own: Int[Tensor, " own"], before: Int[Tensor, " before"] | None, stream: Tensor) -> None:
        self.own = own
        self.base = stream[:, own]
        self.into, self.come = own, own
        if before is not None:
            at = torch.searchsorted(before, own).clamp(max=len(before) - 1)
            self.into = (before[at] == own).nonzero()[:, 0]
            self.come = at[self.into]
        self.first = before is None

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        stream, *others = args or (kwargs["hidden_states"],)
        if self.first:
            own = stream[:, self.own]
        else:
            own = self.base.expand(len(stream), -1, -1).index_copy(1, self.into, stream[:, self.come])
        named = {name: self._select(name, value) for name, value in kwargs.items() if name != "hidden_states"}
        return (own, *(self._select("unnamed", value) for value in others)), named

    def _select(self, name: str, value: Any) -> Any:
        if name == "position_embeddings" and isinstance(value, tuple):
            return tuple(self._select(name, each) for each in value)
        if not isinstance(value, Tensor) or name == "attention_mask":
            return value
        if name == "position_embeddings":
            return value[..., self.own, :]
        if name in ("position_ids", "cache_position"):
            return value[..., self.own]
        raise UnknownArgumentError(name)


class _Restore:
    """Forward hook of the last layer that puts zeros where positions were left out."""

    def __init__(self, tokens: int, positions: Int[Tensor, " computed"]) -> None:
        self.tokens, self.positions = tokens, positions

    def __call__(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        stream = output[0] if isinstance(output, tuple) else output
        whole = stream.new_zeros(len(stream), self.tokens, stream.shape[2]).index_copy(1, self.positions, stream)
        return (whole, *output[1:]) if isinstance(output, tuple) else whole
