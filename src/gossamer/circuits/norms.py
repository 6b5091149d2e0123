"""Norms with their scale held fixed: linear maps, derived from a norm's outputs rather than its class.

    N(x) = scale(x) w * c(x) + bias,   c(x) = x, or x minus its mean

A vector v with mean 0 and root mean square 1, scaled by a large s, reveals w and the bias of any such norm, whatever
its epsilon: N(s v) = w v + bias, N(-s v) = -w v + bias. The norm centres if N(s (v + 1)) equals N(s v). RMSNorm,
LayerNorm, L2 norm and the identity have this form, also with per-head weights. Anything else is detected by comparing
the linear map with the norm's output.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gossamer.errors import GossamerError

_LARGE = 1e4
_TOLERANCE = 1e-3
"""Maximum error of the linear map, relative to the largest output; half precision allows for its rounding as well."""


@dataclass(frozen=True)
class FixedNorm:
    """A norm at some x, its scale held fixed.

    Attributes:
        weight, bias: in the shape of x, or broadcastable to it.
        scale: ``[..., 1]``.
        centred: whether the mean is subtracted.
    """

    weight: Float[Tensor, "*rows features"]
    bias: Float[Tensor, "*rows features"]
    scale: Float[Tensor, "*rows 1"]
    centred: bool

    def linear(self, x: Float[Tensor, "*more features"]) -> Float[Tensor, "*more features"]:
        """Apply the norm to x without its bias."""
        return self.scale * self.weight * _centre(x, self.centred)

    def at(self, *place: Any) -> "FixedNorm":
        """Return the norm at some rows of x."""
        return FixedNorm(self.weight[place], self.bias[place], self.scale[place], self.centred)


def fixed_norm(norm: nn.Module, x: Float[Tensor, "*rows features"]) -> FixedNorm:
    """Return the norm at x with its scale fixed; the scale is differentiable with respect to x.

    Raises:
        GossamerError: if the module is not a norm of this form.
    """
    with torch.no_grad():
        signs = torch.ones_like(x)
        signs[..., ::2] = -1
        unit = signs - signs.mean(-1, keepdim=True)
        unit = unit / unit.pow(2).mean(-1, keepdim=True).sqrt()
        up, down = norm.forward(_LARGE * unit), norm.forward(-_LARGE * unit)
        weight, bias = (up - down) / 2 / unit, (up + down) / 2
        moved = norm.forward(_LARGE * (unit + 1))
        centred = bool((moved - up).abs().max() <= _TOLERANCE * up.abs().max())
    output = norm.forward(x)
    shape = weight * _centre(x, centred)
    size = shape.pow(2).sum(-1, keepdim=True)
    scale = ((output - bias) * shape).sum(-1, keepdim=True) / torch.where(size > 0, size, 1)
    found = FixedNorm(weight, bias, scale, centred)
    error = (found.linear(x) + bias - output).detach().abs().max()
    limit = max(_TOLERANCE, 8 * torch.finfo(x.dtype).eps) * output.detach().abs().max()
    if not error <= limit:
        raise GossamerError(f"{type(norm).__name__} is neither an RMSNorm nor a LayerNorm; its scale cannot be fixed")
    return found


def _centre(x: Tensor, centred: bool) -> Tensor:
    return x - x.mean(-1, keepdim=True) if centred else x
