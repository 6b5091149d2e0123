"""What is known of each model family: where its attention is, and which configurations are refused.

To add a family: one entry in ``ARCHITECTURES`` and one tiny random config in ``tests/models/families.py``.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from gossamer.errors import GossamerError


@dataclass(frozen=True)
class Branches:
    """The modules of a layer that first read the residual stream, and those whose output is added to it.

    Attributes:
        attention_in, attention_out: of attention; a norm, or the attention module itself.
        mlp_in, mlp_out: of the MLP.
        parallel: config field that, when true, lets the MLP read what attention reads, without its output.
        multiplier: config field by which both outputs are multiplied.
    """

    attention_in: str
    attention_out: str
    mlp_in: str
    mlp_out: str
    parallel: str | None = None
    multiplier: str | None = None


@dataclass(frozen=True)
class Architecture:
    """Where one model family keeps its attention.

    Attributes:
        layers: path of the list of decoder layers, from the causal language model.
        attention: name of the attention module within a layer.
        projections: names of the linear maps within the attention module, that of the output last.
        branches: where the residual stream is read and written.
        final_norm: path of the norm before the unembedding, from the causal language model.
        refused: config fields that change attention in a way the gates do not know; refused when truthy.
        interleaved: whether a projection for q, k and v in common has those of a head side by side.
    """

    layers: str
    attention: str
    projections: tuple[str, ...]
    branches: Branches
    final_norm: str = "model.norm"
    refused: tuple[str, ...] = ()
    interleaved: bool = False


_SEPARATE = ("q_proj", "k_proj", "v_proj", "o_proj")
_PRE_NORM = Branches("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
_POST_NORM = Branches("self_attn", "post_attention_layernorm", "mlp", "post_feedforward_layernorm")
_BOTH_NORMS = Branches(
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
)
_LLAMA_LIKE = Architecture("model.layers", "self_attn", _SEPARATE, _PRE_NORM)
_ONE_WAY = ("use_bidirectional_attention",)

ARCHITECTURES: dict[str, Architecture] = {
    "gpt2": Architecture(
        "transformer.h",
        "attn",
        ("c_attn", "c_proj"),
        Branches("ln_1", "attn", "ln_2", "mlp"),
        "transformer.ln_f",
        refused=("add_cross_attention",),
    ),
    "gpt_neox": Architecture(
        "gpt_neox.layers",
        "attention",
        ("query_key_value", "dense"),
        Branches("input_layernorm", "attention", "post_attention_layernorm", "mlp", parallel="use_parallel_residual"),
        "gpt_neox.final_layer_norm",
        interleaved=True,
    ),
    "opt": Architecture(
        "model.decoder.layers",
        "self_attn",
        ("q_proj", "k_proj", "v_proj", "out_proj"),
        Branches("self_attn_layer_norm", "self_attn", "final_layer_norm", "fc2"),
        "model.decoder.final_layer_norm",
    ),
    "llama": _LLAMA_LIKE,
    "mistral": _LLAMA_LIKE,
    "qwen2": _LLAMA_LIKE,
    "qwen3": _LLAMA_LIKE,
    "gemma": Architecture("model.layers", "self_attn", _SEPARATE, _PRE_NORM, refused=_ONE_WAY),
    "gemma2": Architecture("model.layers", "self_attn", _SEPARATE, _BOTH_NORMS, refused=_ONE_WAY),
    "gemma3_text": Architecture("model.layers", "self_attn", _SEPARATE, _BOTH_NORMS, refused=_ONE_WAY),
    "olmo2": Architecture("model.layers", "self_attn", _SEPARATE, _POST_NORM),
    "phi3": Architecture("model.layers", "self_attn", ("qkv_proj", "o_proj"), _PRE_NORM),
    "smollm3": _LLAMA_LIKE,
    "granite": Architecture(
        "model.layers", "self_attn", _SEPARATE, replace(_PRE_NORM, multiplier="residual_multiplier")
    ),
}

# Families whose modelling code never calls the attention interface: their gates would silently do nothing.
_DEAF = ("gpt_neo", "gptj", "bloom", "falcon")


def architecture_of(model: PreTrainedModel) -> Architecture:
    """The entry of the model's family.

    Raises:
        GossamerError: naming the family or the setting that cannot be gated right.
    """
    config = model.config
    family = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise GossamerError(f"{family} is an encoder-decoder; gossamer gates decoder-only language models")
    if family in _DEAF:
        raise GossamerError(
            f"{family} does not call transformers' attention interface, so gates would do nothing in it; "
            f"supported families: {', '.join(ARCHITECTURES)}"
        )
    if family not in ARCHITECTURES:
        if family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            raise GossamerError(f"{family} is not a causal language model; gossamer gates decoders only")
        raise GossamerError(f"{family} is not a supported family; supported families: {', '.join(ARCHITECTURES)}")
    expected = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]
    if type(model).__name__ != expected:
        raise GossamerError(f"{type(model).__name__} is not the causal language model of {family}; use {expected}")
    architecture = ARCHITECTURES[family]
    for field in architecture.refused:
        if getattr(config, field, None):
            raise GossamerError(f"{family} with {field}={getattr(config, field)} cannot be gated right; unset it")
    quantization = getattr(config, "quantization_config", None)
    method = getattr(quantization, "quant_method", None)
    if quantization is not None and method != "gguf":  # transformers dequantises GGUF when it loads
        raise GossamerError(f"{family} with {method} quantisation cannot be trained or saved; load it in full")
    directions = [config, *attention_modules(model)]
    if any(getattr(holder, "is_causal", True) is False for holder in directions):
        raise GossamerError(f"this {family} attends in both directions; gossamer gates causal models only")
    return architecture


def attention_modules(model: PreTrainedModel) -> Iterator[nn.Module]:
    """The attention modules of a supported model, from the first layer to the last."""
    architecture = ARCHITECTURES[model.config.model_type]
    for layer in model.get_submodule(architecture.layers):
        yield layer.get_submodule(architecture.attention)


def check_not_offloaded(model: PreTrainedModel) -> None:
    """Stop at a model some of whose layers accelerate keeps elsewhere between calls: gates could not lie beside them.

    Raises:
        GossamerError: naming the first such layer.
    """
    for name, module in model.named_modules():
        hook = getattr(module, "_hf_hook", None)
        if any(getattr(each, "offload", False) for each in getattr(hook, "hooks", (hook,))):
            raise GossamerError(
                f"{name or 'the model'} is offloaded to another device or the disk; load the model whole, without "
                "device_map or with one that has no 'disk' and offloads nothing to 'cpu'"
            )
