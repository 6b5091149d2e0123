"""A checksum of all weights of a model, to recognise the model again."""

import zlib

import torch
from transformers import PreTrainedModel


def weights_fingerprint(model: PreTrainedModel) -> str:
    """CRC-32 over the CRC-32s of all weights, as 8 hex digits; independent of weight names and devices."""
    seen, sums = set(), []
    for tensor in model.state_dict().values():
        if tensor.data_ptr() not in seen:  # tied weights count once
            seen.add(tensor.data_ptr())
            bytes_of = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            sums.append(zlib.crc32(memoryview(bytes_of)))
    return f"{zlib.crc32(repr(sorted(sums)).encode()):08x}"
