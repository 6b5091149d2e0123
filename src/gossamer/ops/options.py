"""What an implementation of gated attention is handed besides queries, keys, values, gate biases and pairs."""

from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor


class AttentionOptions(NamedTuple):
    """How attention is computed; see :func:`gossamer.gated_attention`.

    Attributes:
        scale: of the logits.
        softcap: c in ``S = c tanh(S / c)``, or None.
        noise: seed and first row of sampled gates; None for hard gates.
        expect: sum up the expected open links.
        counted: count the hard open links.
    """

    scale: float
    softcap: float | None = None
    noise: Int[Tensor, " 2"] | None = None
    expect: bool = True
    counted: bool = True


class BackwardInputs(NamedTuple):
    """What the backward pass is handed besides.

    Attributes:
        output, log_sum_exp: of the forward pass.
        d_output: gradient of the output.
        d_expected: gradient of the expected open links, by query, or None.
    """

    output: Float[Tensor, "batch heads queries d_value"]
    log_sum_exp: Float[Tensor, "batch heads queries"]
    d_output: Float[Tensor, "batch heads queries d_value"]
    d_expected: Float[Tensor, "batch heads queries"] | None
