"""Where q, k and v of each query head stand among the outputs of a layer's projections.

Families differ in whether q, k and v have a projection each, one in common with all q first, or one in common with
q, k and v of a head side by side. With grouped queries several query heads share the columns of k and of v.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from gossamer.models.architectures import architecture_of, attention_modules


@dataclass(frozen=True)
class Projection:
    """Where q, k or v comes from in one layer.

    Attributes:
        name: of the projection within the attention module.
        module: the projection.
        columns: its outputs that belong to each query head.
        mixed: whether a norm over all heads at once follows, so that each head depends on all columns.
    """

    name: str
    module: nn.Module
    columns: Int[Tensor, "heads d_head"]
    mixed: bool

    def turns(self, heads: list[int]) -> Int[Tensor, "some columns"]:
        """The columns on which these heads depend, a row for each; where they mix, only one head may be given."""
        if self.mixed:
            assert len(heads) == 1
            return self.columns.unique()[None]
        return self.columns[heads]

    def weight(self, columns: Int[Tensor, "some columns"]) -> Float[Tensor, "some columns d_model"]:
        """What maps the projection's input to these outputs."""
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        return (weight.mT if isinstance(self.module, Conv1D) else weight)[columns]

    def bias(self, columns: Int[Tensor, "some columns"]) -> Float[Tensor, "some columns"] | float:
        """What is added to them."""
        bias = self.module.bias
        return bias[columns] if isinstance(bias, Tensor) else 0.0


Projections = dict[str, Projection]
"""By kind: ``q``, ``k``, ``v``."""


def projections_of(model: PreTrainedModel) -> list[Projections]:
    """The places of every layer of a supported model."""
    architecture, config = architecture_of(model), model.config
    heads = config.num_attention_heads
    shared = heads // (getattr(config, "num_key_value_heads", None) or heads)
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    names = architecture.projections[:-1]
    own, group = torch.arange(heads), torch.arange(heads) // shared
    if len(names) == 3:
        starts = {"q": own * size, "k": group * size, "v": group * size}
    elif architecture.interleaved:
        starts = {kind: (3 * own + place) * size for place, kind in enumerate("qkv")}
    else:
        keys = heads * size
        values = keys + heads // shared * size
        starts = {"q": own * size, "k": keys + group * size, "v": values + group * size}
    layers = []
    for attention in attention_modules(model):
        places = {}
        for place, kind in enumerate("qkv"):
            name = names[place] if len(names) == 3 else names[0]
            norm = getattr(getattr(attention, f"{kind}_norm", None), "weight", None)
            mixed = norm is not None and norm.numel() != size
            columns = (starts[kind][:, None] + torch.arange(size)).to(model.device)
            places[kind] = Projection(name, attention.get_submodule(name), columns, mixed)
        layers.append(places)
    return layers
