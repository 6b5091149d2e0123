"""Choose the precision of matrix products that is fast on a device."""

import torch

from gossamer.training.settings import Precision


def fast_precision(device: torch.device) -> Precision:
    """``bf16`` where the device multiplies bfloat16 in hardware, else ``fp32``.

    On a processor without such instructions, bfloat16 takes about sixty times as long as float32.
    """
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        fast = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "bf16" if fast else "fp32"
