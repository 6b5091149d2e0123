"""Import GPT-2 checkpoints in nanoGPT's or TransformerLens' layout, as released by the paper's authors, as gated GPT-2.

Both layouts hold the weights of the same architecture under different names and in different shapes (d: width,
V: vocabulary rows, P: positions, H: heads):

    transformers (Conv1D: [in, out])   nanoGPT (Linear: [out, in])      TransformerLens
    wte.weight [V, d]                  transformer.wte.weight           embed.W_E
    wpe.weight [P, d]                  transformer.wpe.weight           pos_embed.W_pos
    h.0.attn.c_attn.weight [d, 3 d]    the same, transposed             blocks.0.attn.W_Q, W_K, W_V [H, d, d / H]
    h.0.attn.c_proj.weight [d, d]      the same, transposed             blocks.0.attn.W_O [H, d / H, d]
    h.0.mlp.c_fc.weight [d, 4 d]       the same, transposed             blocks.0.mlp.W_in
    lm_head.weight [V, d]              lm_head.weight                   unembed.W_U [d, V]

The gates of these checkpoints have no bias: b = 0 in G = S + b.
"""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from gossamer.errors import GossamerError
from gossamer.inputs import check_tensors, read_pickle, reading
from gossamer.models.checkpoint import unwrapped_name
from gossamer.models.convert import add_gates

Activation = Literal["gelu_new", "gelu"]
"""``gelu_new`` is GPT-2's tanh approximation; ``gelu`` is exact, as in nanoGPT's ``nn.GELU()``."""

_HEADS = {768: 12, 1024: 16, 1280: 20, 1600: 25}
"""Number of heads of the published GPT-2 sizes, by width."""

_WRAPPERS = ("model", "state_dict", "model_state_dict")
_NANOGPT_BUFFER = re.compile(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)")
_LENS_BUFFER = re.compile(r"blocks\.\d+\.attn\.(mask|IGNORE)")


def import_checkpoint(
    file: str | os.PathLike[str],
    *,
    heads: int | None = None,
    activation: Activation = "gelu_new",
    vocab_size: int | None = None,
) -> PreTrainedModel:
    """Load a nanoGPT or TransformerLens checkpoint as a gated GPT-2 with gate bias 0, in ``eval()`` mode.

    The file was written by ``torch.save``. It holds a state dict, or a dict with one under ``model``, ``state_dict`` or
    ``model_state_dict``. Prefixes from ``torch.compile`` and data parallelism are removed.

    Args:
        file: the checkpoint; read with ``weights_only=True``.
        heads: number of attention heads. If None, taken from ``model_args`` in the file, from TransformerLens' shapes,
            or from the width if it is that of a published GPT-2.
        activation: of the MLPs; neither layout records it.
        vocab_size: keep this many rows of the vocabulary, to drop padding rows (50,304 -> 50,257); None keeps all.

    Raises:
        GossamerError: naming the file, or the key that is missing, unexpected or of the wrong shape.
    """
    path = Path(file)
    outer = _read(path)
    tensors, arguments = _unwrapped(outer, path)
    if "transformer.wte.weight" in tensors:
        source = _Source(path, tensors)
        layers = source.layers(r"transformer\.h\.(\d+)\.")
        read = _nanogpt
    elif "embed.W_E" in tensors:
        source = _Source(path, tensors)
        layers = source.layers(r"blocks\.(\d+)\.")
        read = _transformer_lens
    else:
        raise GossamerError(
            f"{path} is in no layout known here: it has neither transformer.wte.weight (nanoGPT) nor embed.W_E "
            f"(TransformerLens) but {', '.join(sorted(tensors)[:3])}"
        )
    given = heads or arguments.get("n_head")
    if given is not None and not (isinstance(given, int) and given > 0):
        raise GossamerError(f"{path}: n_head of model_args is {given!r}, no number of heads; give --heads")
    weights, heads = read(source, layers, given)
    source.refuse_unread()
    if vocab_size is not None:
        rows = len(weights["transformer.wte.weight"])
        if not 0 < vocab_size <= rows:
            raise GossamerError(f"{path} has {rows} vocabulary rows; {vocab_size} of them cannot be kept")
        for name in ("transformer.wte.weight", "lm_head.weight"):
            weights[name] = weights[name][:vocab_size]
    return add_gates(_model(weights, layers, heads, activation), inplace=True).eval()


def _read(path: Path) -> Mapping[str, Any]:
    outer = read_pickle(path, remedy="give a checkpoint that torch.save wrote")
    if not isinstance(outer, Mapping):
        raise GossamerError(f"{path} holds a {type(outer).__name__}, not a dict of tensors")
    return outer


def _unwrapped(outer: Mapping[str, Any], path: Path) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """The state dict without wrapper prefixes in its names, and nanoGPT's model_args if present."""
    arguments = outer.get("model_args")
    inner = next((outer[name] for name in _WRAPPERS if isinstance(outer.get(name), Mapping)), outer)
    tensors: dict[str, Tensor] = {}
    for key, value in inner.items():
        name = unwrapped_name(str(key))
        if not isinstance(value, Tensor):
            raise GossamerError(f"{path}: {key} is a {type(value).__name__}, not a tensor")
        tensors[name] = value
    if not tensors:
        raise GossamerError(f"{path} holds no tensors")
    return tensors, arguments if isinstance(arguments, Mapping) else {}


@dataclass
class _Source:
    """The tensors of a checkpoint, each taken by name and required shape."""

    path: Path
    tensors: dict[str, Tensor]
    read: set[str] = field(default_factory=set)

    def layers(self, pattern: str) -> int:
        """Number of layers, from the weight names."""
        found = {int(match[1]) for name in self.tensors if (match := re.match(pattern, name))}
        if found != set(range(len(found))) or not found:
            raise GossamerError(f"{self.path} has the layers {sorted(found)}, not one after another from 0")
        return len(found)

    def take(self, name: str, *shape: int | None) -> Tensor:
        """The tensor in float32; None in the shape accepts any size."""
        if name not in self.tensors:
            raise GossamerError(f"{self.path} lacks {name}{self.why_missing(name)}")
        tensor = self.tensors[name]
        fits = tensor.ndim == len(shape) and all(b is None or a == b for a, b in zip(tensor.shape, shape, strict=True))
        if not fits:
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            raise GossamerError(f"{self.path}: {name} has shape {list(tensor.shape)}, not [{wanted}]")
        self.read.add(name)
        with reading(self.path):
            check_tensors({name: tensor})
        return tensor.float()

    def why_missing(self, name: str) -> str:
        """A hint for the error message on why the tensor is missing; may be empty."""
        folded = re.search(r"(ln\d|ln_final)\.[wb]$", name) and not any(".ln1.w" in key for key in self.tensors)
        return "; its layer norms were folded: save the model with fold_ln=False" if folded else ""

    def skip(self, buffers: re.Pattern[str]) -> None:
        """Mark buffers that are not weights as read."""
        self.read.update(name for name in self.tensors if buffers.fullmatch(name))

    def refuse_unread(self) -> None:
        """Raise if a tensor has not been read."""
        if left := sorted(set(self.tensors) - self.read):
            more = f" and {len(left) - 1} more" if len(left) > 1 else ""
            raise GossamerError(f"{self.path}: {left[0]}{more} has no place in a GPT-2")


def _nanogpt(source: _Source, layers: int, heads: int | None) -> tuple[dict[str, Tensor], int]:
    source.skip(_NANOGPT_BUFFER)
    wte = source.take("transformer.wte.weight", None, None)
    rows, width = wte.shape
    # nanoGPT's bias=False drops every bias; if only some biases are missing, that is an error.
    biased = any(name.endswith(".bias") and name not in source.read for name in source.tensors)

    def bias(name: str, size: int) -> Tensor:
        return source.take(name, size) if biased else torch.zeros(size)

    weights = {
        "transformer.wte.weight": wte,
        "transformer.wpe.weight": source.take("transformer.wpe.weight", None, width),
        "lm_head.weight": source.take("lm_head.weight", rows, width),
    }
    norms = ["transformer.ln_f"]
    for layer in range(layers):
        at = f"transformer.h.{layer}"
        norms += [f"{at}.ln_1", f"{at}.ln_2"]
        maps = {"attn.c_attn": (3, 1), "attn.c_proj": (1, 1), "mlp.c_fc": (4, 1), "mlp.c_proj": (1, 4)}
        for name, (out, into) in maps.items():
            weights[f"{at}.{name}.weight"] = source.take(f"{at}.{name}.weight", out * width, into * width).T
            weights[f"{at}.{name}.bias"] = bias(f"{at}.{name}.bias", out * width)
    for name in norms:
        weights[f"{name}.weight"] = source.take(f"{name}.weight", width)
        weights[f"{name}.bias"] = bias(f"{name}.bias", width)
    return weights, _heads(source, width, heads)


def _heads(source: _Source, width: int, heads: int | None) -> int:
    heads = heads or _HEADS.get(width)
    if heads is None:
        raise GossamerError(f"{source.path} does not say how many heads share its width of {width}; give --heads")
    if width % heads:
        raise GossamerError(f"{source.path} has a width of {width}, which {heads} heads cannot share")
    return heads


def _transformer_lens(source: _Source, layers: int, heads: int | None) -> tuple[dict[str, Tensor], int]:
    source.skip(_LENS_BUFFER)
    wte = source.take("embed.W_E", None, None)
    rows, width = wte.shape
    found = len(source.take("blocks.0.attn.W_Q", None, width, None))
    if heads not in (None, found):
        raise GossamerError(f"{source.path} has {found} heads by the shape of blocks.0.attn.W_Q, not {heads}")
    size = width // found
    weights = {
        "transformer.wte.weight": wte,
        "transformer.wpe.weight": source.take("pos_embed.W_pos", None, width),
        "lm_head.weight": source.take("unembed.W_U", width, rows).T,
        "transformer.ln_f.weight": source.take("ln_final.w", width),
        "transformer.ln_f.bias": source.take("ln_final.b", width),
    }
    if "unembed.b_U" in source.tensors and source.take("unembed.b_U", rows).any():
        raise GossamerError(
            f"{source.path}: unembed.b_U is not 0, but GPT-2 has no bias there; save with fold_ln=False"
        )
    for layer in range(layers):
        here, at = f"blocks.{layer}", f"transformer.h.{layer}"
        take: Callable[..., Tensor] = lambda name, *shape, here=here: source.take(f"{here}.{name}", *shape)  # noqa: E731
        # [heads, width, size] -> [width, heads * size], then q, k and v concatenated.
        qkv = [take(f"attn.W_{part}", found, width, size).transpose(0, 1).flatten(1) for part in "QKV"]
        weights |= {
            f"{at}.attn.c_attn.weight": torch.cat(qkv, dim=1),
            f"{at}.attn.c_attn.bias": torch.cat([take(f"attn.b_{part}", found, size).flatten() for part in "QKV"]),
            f"{at}.attn.c_proj.weight": take("attn.W_O", found, size, width).flatten(0, 1),
            f"{at}.attn.c_proj.bias": take("attn.b_O", width),
            f"{at}.mlp.c_fc.weight": take("mlp.W_in", width, 4 * width),
            f"{at}.mlp.c_fc.bias": take("mlp.b_in", 4 * width),
            f"{at}.mlp.c_proj.weight": take("mlp.W_out", 4 * width, width),
            f"{at}.mlp.c_proj.bias": take("mlp.b_out", width),
        }
        for ours, theirs in (("ln_1", "ln1"), ("ln_2", "ln2")):
            weights[f"{at}.{ours}.weight"] = take(f"{theirs}.w", width)
            weights[f"{at}.{ours}.bias"] = take(f"{theirs}.b", width)
    return weights, found


def _model(weights: dict[str, Tensor], layers: int, heads: int, activation: Activation) -> GPT2LMHeadModel:
    rows, width = weights["transformer.wte.weight"].shape
    tied = torch.equal(weights["transformer.wte.weight"], weights["lm_head.weight"])
    end = 50256 if rows > 50256 else None  # <|endoftext|>
    config = GPT2Config(
        vocab_size=rows, n_positions=len(weights["transformer.wpe.weight"]), n_embd=width, n_layer=layers,
        n_head=heads, activation_function=activation, tie_word_embeddings=tied, name_or_path="gpt2",
        bos_token_id=end, eos_token_id=end,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    model.load_state_dict(weights)
    return model
