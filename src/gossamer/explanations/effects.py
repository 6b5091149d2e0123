"""The effect of a link: the tokens that it promotes where it writes, and the metric without it.

A link adds w_ij v_j W_O to the residual stream at its query position. Its direct effect on the logits there, through
the final norm (its scale held fixed) and the unembedding, gives the tokens that it promotes and demotes; later layers
may transform what it writes. Its effect on the prediction is measured: the metric with every link minus the metric
when this link alone is cut.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from gossamer.circuits.activation_cache import LinkRecorder
from gossamer.circuits.link_masks import LinkMasks
from gossamer.circuits.norms import FixedNorm, fixed_norm
from gossamer.circuits.streams import output_maps, stream_hooks
from gossamer.models.architectures import architecture_of

SHOWN_TOKENS = 5
"""Number of promoted tokens, and of demoted tokens, that are reported."""


@dataclass(frozen=True)
class LinkEffect:
    """The effect of one link.

    Attributes:
        weight: attention weight.
        promotes, demotes: ids of the tokens whose logits it raises and lowers most where it writes.
        alone: share of the metric that is lost when this link alone is cut from the whole model.
        in_set: share that is lost when it is cut from the set, with all links outside the set cut.
    """

    weight: float
    promotes: tuple[int, ...]
    demotes: tuple[int, ...]
    alone: float
    in_set: float


@dataclass
class _Recorder(LinkRecorder):
    norms: dict[int, FixedNorm] = field(default_factory=dict)
    final: Tensor | None = None

    def norm_heads(self, layer: int, norm: FixedNorm) -> None:
        self.norms[layer] = norm

    def read_logits(self, x: Tensor) -> Tensor:
        self.final = x
        return x


@torch.no_grad()
def link_effects(masks: LinkMasks, chosen: Bool[Tensor, " links"], places: Int[Tensor, " some"]) -> list[LinkEffect]:
    """Measure the effects of some links of a set.

    Args:
        masks: the prediction.
        chosen: the set.
        places: indices of the links in ``masks.links``.
    """
    model = masks.model
    recorder = _Recorder()
    with stream_hooks(model, recorder):
        model(input_ids=masks.ids, use_cache=False)
    maps = output_maps(model)
    alone, in_set = _losses(masks, chosen, places)
    found = []
    for at, (layer, head, query, key) in enumerate(masks.links.cpu()[places].tolist()):
        weight = recorder.weights[layer][0, head, query, key]
        written = weight * recorder.values[layer][0, head, key] @ maps[layer][head]
        if layer in recorder.norms:
            written = recorder.norms[layer].at(0, query).linear(written)
        assert recorder.final is not None
        logits = _direct_logits(model, written, recorder.final[:, query])
        count = min(SHOWN_TOKENS, len(logits))
        found.append(
            LinkEffect(
                float(weight), tuple(logits.topk(count).indices.tolist()),
                tuple(logits.topk(count, largest=False).indices.tolist()), alone[at], in_set[at],
            )
        )  # fmt: skip
    return found


def _losses(masks: LinkMasks, chosen: Tensor, places: Tensor) -> tuple[list[float], list[float]]:
    """Shares of the metric that are lost when each link is cut from the whole model, and from the set."""
    single = [torch.zeros_like(chosen).index_fill_(0, place, True) for place in places]
    alone = masks.left_when_cut(single)
    kept = masks.kept([chosen, *(chosen & ~each for each in single)])
    return (1 - alone).tolist(), (kept[0] - kept[1:]).tolist()


def _direct_logits(
    model: PreTrainedModel, written: Float[Tensor, " d_model"], stream: Float[Tensor, "1 d_model"]
) -> Float[Tensor, " vocab"]:
    """The change of the logits that a vector in the residual stream causes, with the final norm's scale held fixed."""
    path = architecture_of(model).final_norm
    assert path is not None
    norm = fixed_norm(model.get_submodule(path), stream[None]).at(0, 0)
    head = model.get_output_embeddings()
    return (head.weight @ norm.linear(written)).float()
