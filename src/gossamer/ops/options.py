"""Arguments of the gated attention implementations besides queries, keys, values, gate biases and pairs."""

from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor


class AttentionOptions(NamedTuple):
    """Options of the attention computation; see :func:`gossamer.gated_attention`.

    Attributes:
        scale: of the logits.
        softcap: c in ``S = c tanh(S / c)``, or None.
        noise: seed and first row for sampled gates; None for hard gates.
        expect: compute the expected open links.
        counted: count the hard open links.
    """

    scale: float
    softcap: float | None = None
    noise: Int[Tensor, " 2"] | None = None
    expect: bool = True
    counted: bool = True


class BackwardInputs(NamedTuple):
    """Additional inputs of the backward pass.

    Attributes:
        output, log_sum_exp: results of the forward pass.
        d_output: gradient with respect to the output.
        d_expected: gradient with respect to the expected open links, by query, or None.
    """

    output: Float[Tensor, "batch heads queries d_value"]
    log_sum_exp: Float[Tensor, "batch heads queries"]
    d_output: Float[Tensor, "batch heads queries d_value"]
    d_expected: Float[Tensor, "batch heads queries"] | None
