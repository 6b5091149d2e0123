"""Interpolate between the dense model's weights and the trained ones: W = W_dense + share * (W_trained - W_dense).

Interpolated weights often preserve what the dense model is good at better than fine-tuned ones (WiSE-FT, Wortsman et
al. 2022, arXiv 2109.01903). Here they bring a run inside its bound when opening gates is not enough.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

SHARES = (0.5, 0.25, 0.0)
"""Shares of the trained change, tried in this order if no shift of the gates meets the bound."""


class Interpolation:
    """Interpolates the weights of a trained model; the gates stay unchanged.

    Args:
        model: gated model whose weights, or adapters on them, were trained.
        dense: the dense model's weights by name; unused with adapters, whose product is scaled instead.
    """

    def __init__(self, model: nn.Module, dense: Mapping[str, Tensor]) -> None:
        adapted = {name: None for name, _ in model.named_parameters() if ".lora_B." in name}
        self._dense: Mapping[str, Tensor | None] = adapted or dense
        self._weights = {name: weight for name, weight in model.named_parameters() if name in self._dense}
        # On the CPU, since an accelerator may lack the memory for another copy.
        self._trained = {name: _local(weight).detach().to("cpu", copy=True) for name, weight in self._weights.items()}

    @property
    def possible(self) -> bool:
        """Whether there are weights to interpolate."""
        return bool(self._weights)

    @torch.no_grad()
    def keep(self, share: float) -> None:
        """Keep ``share`` of the trained change: 1 sets the trained weights, 0 the dense ones."""
        for name, weight in self._weights.items():
            trained, dense = self._trained[name], self._dense[name]
            if share == 1.0:
                value = trained
            elif dense is None:
                value = share * trained
            else:
                value = torch.lerp(_local_part(dense, weight).to(trained), trained, share)
            _local(weight).copy_(value)


def _local(weight: Tensor) -> Tensor:
    """This process's part of a weight that may be sharded."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def _local_part(whole: Tensor, like: Tensor) -> Tensor:
    """This process's part of ``whole`` under the sharding of ``like``."""
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements).to_local()
