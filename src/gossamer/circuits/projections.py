"""Find the columns of a layer's projections that hold q, k and v of each query head.

Model families differ in whether q, k and v have separate projections or a joint one, in the order of its outputs, in
how many query heads share k and v, and in norms that couple all heads. The columns are therefore traced on the model:
one token is run, every projection's outputs are replaced by independent random numbers, and the gradient of each head's
q, k and v shows which of them it depends on.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from gossamer.circuits.streams import Norm, Pattern, StreamHooks, graph_of, stream_hooks
from gossamer.errors import GossamerError
from gossamer.models.architectures import attention_modules

_SMALL = 0.1
"""Scale of the random numbers that replace a projection's outputs; some models clip larger ones."""


@dataclass(frozen=True)
class Projection:
    """Where q, k or v comes from in one layer.

    Attributes:
        name: name of the projection within the attention module.
        module: the projection.
        columns: the projection's outputs that each query head depends on; all of them if a norm spans all heads.
    """

    name: str
    module: nn.Module
    columns: Int[Tensor, "heads columns"]

    def sharing(self) -> Bool[Tensor, "heads heads"]:
        """Return which pairs of heads share a column."""
        used = torch.zeros(len(self.columns), int(self.columns.max()) + 1)
        used.scatter_(1, self.columns.cpu(), 1.0)
        return used @ used.T > 0

    def weight(self, columns: Int[Tensor, "some columns"]) -> Float[Tensor, "some columns d_model"]:
        """Weights that map the projection's input to these outputs."""
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        return (weight.mT if isinstance(self.module, Conv1D) else weight)[columns]

    def bias(self, columns: Int[Tensor, "some columns"]) -> Float[Tensor, "some columns"] | float:
        """Bias of these outputs."""
        bias = self.module.bias
        return bias[columns] if isinstance(bias, Tensor) else 0.0


Projections = dict[str, Projection]
"""The projections of one layer by kind: ``q``, ``k``, ``v``."""

_Places = dict[str, tuple[str, Tensor]]
_TRACED: "WeakKeyDictionary[PreTrainedModel, list[_Places]]" = WeakKeyDictionary()


def projections_of(model: PreTrainedModel) -> list[Projections]:
    """Return the projections of every layer of a supported model.

    Raises:
        GossamerError: if queries, keys or values of a head are not a projection of the stream.
    """
    if model not in _TRACED:
        _TRACED[model] = _trace(model)
    return [
        {
            kind: Projection(name, attention.get_submodule(name), columns.to(model.device))
            for kind, (name, columns) in places.items()
        }
        for attention, places in zip(attention_modules(model), _TRACED[model], strict=True)
    ]


def repetitions(projections: Projections) -> int:
    """The smallest r such that no two heads with the same index modulo r share a column."""
    shared = torch.stack([projection.sharing() for projection in projections.values()]).any(0)
    heads = torch.arange(len(shared))
    apart = (heads[:, None] - heads).abs()[shared]
    return next(r for r in range(1, len(shared) + 1) if not ((apart % r == 0) & (apart > 0)).any())


class _Tracer(StreamHooks):
    def __init__(self, family: str) -> None:
        self.family = family
        self.layers: list[_Places] = []
        self.stream: Tensor | None = None
        self.outputs: dict[str, Tensor] = {}
        self.inner: set[str] = set()
        self.random = torch.Generator().manual_seed(0)

    def _numbers(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.random).to(like)

    def read_attention(self, layer: int, x: Tensor, norm: Norm) -> Tensor:
        self.stream, self.outputs, self.inner = norm(x).detach(), {}, set()
        return x

    def project(self, layer: int, name: str, x: Tensor, y: Tensor) -> Tensor:
        if self.stream is None or x.shape != self.stream.shape or not torch.equal(x, self.stream):
            self.inner.add(name)
        self.outputs[name] = (_SMALL * self._numbers(y)).requires_grad_()
        return self.outputs[name]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> Tensor:
        self.layers.append({kind: self._place(x) for kind, x in (("q", q), ("k", k), ("v", v))})
        return torch.zeros_like(v)

    def _place(self, x: Float[Tensor, "1 heads 1 d"]) -> tuple[str, Tensor]:
        rows: dict[str, list[Tensor]] = {name: [] for name in self.outputs}
        for head in range(x.shape[1]):
            own = x[0, head, 0]
            found = torch.autograd.grad(
                own, list(self.outputs.values()), self._numbers(own), retain_graph=True, allow_unused=True
            )
            for name, gradient in zip(self.outputs, found, strict=True):
                depends = gradient is not None and bool(gradient.any())
                rows[name].append(gradient.flatten().nonzero()[:, 0].cpu() if depends else torch.empty(0))
        used = [name for name, columns in rows.items() if any(len(each) for each in columns)]
        if len(used) != 1 or used[0] in self.inner or len({len(each) for each in rows[used[0]]}) != 1:
            raise GossamerError(
                f"queries, keys or values of {self.family} are no projections of the residual stream (latent "
                "attention), so its heads have no inputs that could be patched alone; --levels links, or --levels "
                "nodes,links --score exact, do without"
            )
        return used[0], torch.stack(rows[used[0]])


def _trace(model: PreTrainedModel) -> list[_Places]:
    tracer = _Tracer(model.config.model_type)
    graph_of(model)
    with stream_hooks(model, tracer), torch.enable_grad(), _frozen(model):
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False, logits_to_keep=1)
    return tracer.layers


@contextmanager
def _frozen(model: PreTrainedModel) -> Iterator[None]:
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
