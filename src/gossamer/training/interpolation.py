"""Weights on the way from the dense model's to the trained ones: W = W_dense + share * (W_trained - W_dense).

Fine-tuned weights between the two often do better than either on what the dense model is good at (WiSE-FT, Wortsman et
al. 2022, arXiv 2109.01903). Here they bring a run inside a bound that opening gates alone cannot hold.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

SHARES = (0.5, 0.25, 0.0)
"""Of what training changed, tried in this order where no shift of the gates holds the bound."""


class Interpolation:
    """Moves the weights of a trained model between the dense model's and its own; the gates are left alone.

    Args:
        model: gated, its weights trained, or adapters on them.
        dense: the dense model's weights by name; unused where adapters were trained, whose product is scaled instead.
    """

    def __init__(self, model: nn.Module, dense: Mapping[str, Tensor]) -> None:
        adapted = {name: None for name, _ in model.named_parameters() if ".lora_B." in name}
        self._dense: Mapping[str, Tensor | None] = adapted or dense
        self._weights = {name: weight for name, weight in model.named_parameters() if name in self._dense}
        # On the CPU: beside weights and optimiser, an accelerator may have no room for another copy.
        self._trained = {name: _local(weight).detach().to("cpu", copy=True) for name, weight in self._weights.items()}

    @property
    def possible(self) -> bool:
        """Whether there are weights to move."""
        return bool(self._weights)

    @torch.no_grad()
    def keep(self, share: float) -> None:
        """Set the weights to ``share`` of what training changed: 1 for the trained weights, 0 for the dense ones."""
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
    """What this process has of a weight that may be sharded."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def _local_part(whole: Tensor, like: Tensor) -> Tensor:
    """What this process would have of ``whole`` if it were sharded as ``like`` is."""
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements).to_local()
