"""Why a link is open: the gate's logit is split by upstream writers, and the largest parts are tested.

The residual stream that attention reads at position i is x_i = sum_u w_u(i) over its writers u: the embeddings, every
head and MLP of earlier layers, and the biases. With the scale of the norms held fixed, queries and keys are linear in
it, including rotary embeddings, so that

    S_ij = sum_u sum_v s q_i^(u) . k_j^(v)        exactly, and the gate is open where softcap(S_ij) + b > 0

The norms are those before attention and those of queries and keys; the centring of a LayerNorm is already linear. To
test a writer, its part is removed from x_i for the query (or from x_j for the key) and the gate's logit is recomputed,
first with the scale of the norms held fixed, then with the norms recomputed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from gossamer.circuits.activation_cache import ActivationCache, run_with_cache
from gossamer.circuits.graph import Graph
from gossamer.circuits.norms import fixed_norm
from gossamer.circuits.streams import Norm, Pattern, StreamHooks, branches_of, graph_of, stream_hooks
from gossamer.errors import GossamerError
from gossamer.models.architectures import architecture_of, attention_modules
from gossamer.models.structure import norms_of_heads

BIASES = "biases"
"""The writer of everything that no head, MLP or embedding wrote."""

SHOWN_PAIRS = 5
"""Number of pairs of writers, those with the largest parts, that are recorded for a link."""

TESTED = 3
"""Number of writers, those with the largest parts, that are tested on each side of a link."""


@dataclass(frozen=True)
class GateSplit:
    """The logit of one link, split by writers.

    Attributes:
        link: layer, head, query position, key position.
        writers: names of the rows and columns of ``parts``: ``input``, ``a3.h5``, ``m3``, ``biases``.
        parts: s q^(u) . k^(v) for each writer u of the query and v of the key; they sum to ``logit``.
        logit: S before softcap, as the model computed it.
        bias: b of the head; None in a dense model.
        softcap: of the logits, or None.
    """

    link: tuple[int, int, int, int]
    writers: tuple[str, ...]
    parts: Float[Tensor, "writers writers"]
    logit: float
    bias: float | None
    softcap: float | None

    def gate(self, logit: float) -> float:
        """The gate's logit for an attention logit: softcap applied and the bias, if there is one, added."""
        capped = logit if self.softcap is None else self.softcap * float(torch.tensor(logit / self.softcap).tanh())
        return capped + (self.bias or 0.0)


@dataclass(frozen=True)
class WriterTest:
    """A gate without a writer's part in the query or in the key.

    Attributes:
        side: the side from which the part was removed.
        writer: its name.
        part: the sum of the writer's parts of the logit.
        gate_fixed: the gate's logit without the writer, with the scale of the norms held fixed.
        gate_recomputed: the same with the norms recomputed.
    """

    side: Literal["query", "key"]
    writer: str
    part: float
    gate_fixed: float
    gate_recomputed: float

    @property
    def closes(self) -> bool:
        """Whether the gate closes in both tests."""
        return self.gate_fixed <= 0 and self.gate_recomputed <= 0


@dataclass(frozen=True)
class Reason:
    """Why one link is open.

    Attributes:
        link: layer, head, query position, key position.
        gate: the logit of its gate; in a dense model the attention logit.
        pairs: the (query, key) pairs of writers with the largest parts of the logit, and these parts.
        tests: tests of the writers with the largest parts on each side; empty in a dense model.
    """

    link: tuple[int, int, int, int]
    gate: float
    pairs: tuple[tuple[str, str, float], ...]
    tests: tuple[WriterTest, ...]


class _Reached(Exception):
    """Raised to end the forward pass once the layer's queries and keys are computed."""


class _QueriesAndKeys(StreamHooks):
    """Computes queries and keys of one layer for given residual streams and ends the forward pass there."""

    def __init__(self, layer: int, stream: Float[Tensor, "rows tokens d_model"]) -> None:
        self.layer, self.stream = layer, stream
        self.q = self.k = stream
        self.pattern: Pattern | None = None

    def read_attention(self, layer: int, x: Tensor, norm: Norm) -> Tensor:
        return self.stream if layer == self.layer else x

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> Tensor:
        if layer == self.layer:
            self.q, self.k, self.pattern = q, k, pattern
            raise _Reached
        return super().attend(layer, q, k, v, pattern)

    def run(self, model: PreTrainedModel, ids: Int[Tensor, "1 tokens"]) -> Pattern:
        """Run the model up to the layer."""
        try:
            with stream_hooks(model, self):
                model(input_ids=ids, use_cache=False, logits_to_keep=1)
        except _Reached:
            pass
        assert self.pattern is not None
        return self.pattern


@contextmanager
def fixed_norms(model: PreTrainedModel, layer: int) -> Iterator[None]:
    """Within the block, gradients treat the scale of a layer's norms before queries and keys as constant.

    Raises:
        GossamerError: when the model runs, if a norm is neither RMSNorm nor LayerNorm.
    """
    architecture = architecture_of(model)
    decoder = model.get_submodule(architecture.layers)[layer]
    attention = decoder.get_submodule(architecture.attention)
    before = decoder.get_submodule(branches_of(model).attention_in)
    norms = norms_of_heads(attention) + ([] if before is attention else [before])
    hooks = [norm.register_forward_hook(_fixed) for norm in norms]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _fixed(norm: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    fixed = fixed_norm(norm, args[0].detach())
    return fixed.linear(args[0]) + fixed.bias


def require_sums(model: PreTrainedModel) -> None:
    """Check that the model's queries and keys are sums of what was written.

    Raises:
        GossamerError: if they are not, naming the setting.
    """
    if (clip := architecture_of(model).clip) is not None:
        raise GossamerError(
            f"{model.config.model_type} with clip_qkv={clip} cuts queries and keys off, so they are not the sum of "
            "what was written and links cannot be explained"
        )


class GateSplitter:
    """Splits the logits of a prompt's links.

    Args:
        model: dense or gated, in ``eval()`` mode, its weights frozen.
        ids: the prompt's tokens.

    Raises:
        GossamerError: if the model cannot be decomposed.
    """

    def __init__(self, model: PreTrainedModel, ids: tuple[int, ...]) -> None:
        require_sums(model)
        self.model = model
        self.ids = torch.tensor([ids], device=model.device)
        self.graph: Graph = graph_of(model)
        self.cache: ActivationCache = run_with_cache(model, self.ids)

    def _writers(self, layer: int, position: int) -> Float[Tensor, "writers d_model"]:
        """What each writer added to the residual stream at a position, the biases last."""
        written = self.cache.written[: self.graph.sources_before(layer), 0, position]
        rest = self.cache.read["q", layer][0, position] - written.sum(0)
        return torch.cat([written, rest[None]])

    def writer_names(self, layer: int) -> tuple[str, ...]:
        """Names of the writers whose output the attention of a layer reads."""
        return (*map(self.graph.source_name, range(self.graph.sources_before(layer))), BIASES)

    def split(self, layer: int, links: list[tuple[int, int, int]]) -> list[GateSplit]:
        """Split the logits of links of one layer, each given as (head, query, key)."""
        stream = self.cache.read["q", layer].detach().requires_grad_()
        reader = _QueriesAndKeys(layer, stream)
        with fixed_norms(self.model, layer), torch.enable_grad():
            pattern = reader.run(self.model, self.ids)
            ends = [(reader.q[0, head, query], reader.k[0, head, key]) for head, query, key in links]
        module = list(attention_modules(self.model))[layer]
        found = []
        for (head, query, key), (q_end, k_end) in zip(links, ends, strict=True):
            of_query = self._parts(q_end, stream, layer, query)
            of_key = self._parts(k_end, stream, layer, key)
            bias = None if pattern.bias is None else float(module.gate_bias[head])  # type: ignore[index]
            logit = pattern.scale * float(q_end.detach() @ k_end.detach())
            found.append(
                GateSplit((layer, head, query, key), self.writer_names(layer), pattern.scale * of_query @ of_key.mT,
                          logit, bias, pattern.softcap)
            )  # fmt: skip
        return found

    def _parts(
        self, vector: Float[Tensor, " d_head"], stream: Tensor, layer: int, position: int
    ) -> Float[Tensor, "writers d_head"]:
        """Split a query or key at a position by writers."""
        each = torch.eye(len(vector), device=vector.device, dtype=vector.dtype)
        (jacobian,) = torch.autograd.grad(vector, stream, each, retain_graph=True, is_grads_batched=True)
        parts = self._writers(layer, position) @ jacobian[:, 0, position].mT
        parts[-1] += vector.detach() - parts.sum(0)  # biases of projections and norms
        return parts

    def explain(self, links: list[tuple[int, int, int, int]]) -> list[Reason]:
        """Find why each link is open: its largest parts and their tests, in the order of the links."""
        reasons: dict[tuple[int, int, int, int], Reason] = {}
        for layer in sorted({link[0] for link in links}):
            own = [link[1:] for link in links if link[0] == layer]
            splits = self.split(layer, own)
            tests = self._tests(layer, splits)
            for split, of_link in zip(splits, tests, strict=True):
                reasons[split.link] = Reason(split.link, split.gate(split.logit), largest_pairs(split), of_link)
        return [reasons[link] for link in links]

    @torch.no_grad()
    def _tests(self, layer: int, splits: list[GateSplit]) -> list[tuple[WriterTest, ...]]:
        """Run the tests of several links of one layer in one pass."""
        if splits[0].bias is None:
            return [() for _ in splits]
        stream = self.cache.read["q", layer]
        rows, cases = [stream[0]], []
        for at, split in enumerate(splits):
            _, _, query, key = split.link
            for side, position, totals in (("query", query, split.parts.sum(1)), ("key", key, split.parts.sum(0))):
                for writer in totals[:-1].topk(min(TESTED, len(totals) - 1)).indices.tolist():
                    without = stream[0].clone()
                    without[position] -= self._writers(layer, position)[writer]
                    cases.append((at, side, writer, float(totals[writer]), len(rows)))
                    rows.append(without)
        reader = _QueriesAndKeys(layer, torch.stack(rows))
        pattern = reader.run(self.model, self.ids)
        found: list[list[WriterTest]] = [[] for _ in splits]
        for at, side, writer, part, row in cases:
            split = splits[at]
            _, head, query, key = split.link
            q = reader.q[row if side == "query" else 0, head, query]
            k = reader.k[row if side == "key" else 0, head, key]
            found[at].append(
                WriterTest(
                    "query" if side == "query" else "key", split.writers[writer], part, split.gate(split.logit - part),
                    split.gate(pattern.scale * float(q @ k)),
                )
            )  # fmt: skip
        return [tuple(each) for each in found]


def largest_pairs(split: GateSplit, count: int = SHOWN_PAIRS) -> tuple[tuple[str, str, float], ...]:
    """The (query, key) pairs of writers with the largest parts by absolute value."""
    flat = split.parts.flatten()
    places = flat.abs().topk(min(count, len(flat))).indices.tolist()
    width = len(split.writers)
    return tuple((split.writers[place // width], split.writers[place % width], float(flat[place])) for place in places)
