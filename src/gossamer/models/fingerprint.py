"""Whether a model is the one that it was: a checksum of all its weights."""

import zlib

import torch
from transformers import PreTrainedModel


def weights_fingerprint(model: PreTrainedModel) -> str:
    """The CRC-32 of every weight, whatever it is called and on whichever device it lies, put together to one."""
    seen, sums = set(), []
    for tensor in model.state_dict().values():
        if tensor.data_ptr() not in seen:  # tied weights count once
            seen.add(tensor.data_ptr())
            bytes_of = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            sums.append(zlib.crc32(memoryview(bytes_of)))
    return f"{zlib.crc32(repr(sorted(sums)).encode()):08x}"
