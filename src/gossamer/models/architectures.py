"""Check whether a model can be gated, and locate its attention; refuse unsupported families and settings."""

from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

from gossamer.errors import GossamerError
from gossamer.models.structure import PROVEN, Architecture, attention_modules, structure_of

__all__ = ["PROVEN", "Architecture", "architecture_of", "attention_modules", "check_not_offloaded"]

_REFUSED_SETTINGS = ("add_cross_attention", "use_bidirectional_attention")


def architecture_of(model: PreTrainedModel) -> Architecture:
    """The architecture of a model, after checking that it can be gated.

    Raises:
        GossamerError: naming the family or setting that cannot be gated correctly.
    """
    config = model.config
    family = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise GossamerError(f"{family} is an encoder-decoder; gossamer gates decoder-only language models")
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise GossamerError(f"{family} is not a causal language model; gossamer gates decoders only")
    expected = AutoModelForCausalLM._model_mapping[type(config)].__name__
    if type(model).__name__ != expected:
        raise GossamerError(f"{type(model).__name__} is not the causal language model of {family}; use {expected}")
    architecture = structure_of(model)
    for field in _REFUSED_SETTINGS:
        if getattr(config, field, None):
            raise GossamerError(f"{family} with {field}={getattr(config, field)} cannot be gated right; unset it")
    quantization = getattr(config, "quantization_config", None)
    method = getattr(quantization, "quant_method", None)
    if quantization is not None and method != "gguf":  # transformers dequantises GGUF when it loads
        raise GossamerError(f"{family} with {method} quantisation cannot be trained or saved; load it in full")
    directions: list[Any] = [config, *attention_modules(model)]
    if any(getattr(holder, "is_causal", True) is False for holder in directions):
        raise GossamerError(f"this {family} attends in both directions; gossamer gates causal models only")
    return architecture


def check_not_offloaded(model: PreTrainedModel) -> None:
    """Raise if accelerate offloads some layers of the model: gates cannot be placed on the same device as those.

    Raises:
        GossamerError: naming the first offloaded layer.
    """
    for name, module in model.named_modules():
        hook = getattr(module, "_hf_hook", None)
        if any(getattr(each, "offload", False) for each in getattr(hook, "hooks", (hook,))):
            raise GossamerError(
                f"{name or 'the model'} is offloaded to another device or the disk; load the model whole, without "
                "device_map or with one that has no 'disk' and offloads nothing to 'cpu'"
            )
