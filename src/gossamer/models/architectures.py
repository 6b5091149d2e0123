"""Which models can be gated: families that are proven, and settings that are refused.

A family that is not in :data:`PROVEN` is looked for in the model's own modules and proven when gates are put in.
"""

from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

from gossamer.errors import GossamerError
from gossamer.models.structure import Architecture, attention_modules, structure_of

# fmt: off
PROVEN = frozenset((
    "afmoe", "apertus", "apertus1p5_text", "arcee", "aria_text", "axk1", "biogpt", "bitnet", "codegen", "cohere",
    "cohere2", "cohere2_moe", "cohere_compass_text", "ctrl", "cwm", "dbrx", "deepseek_v2", "deepseek_v3",
    "diffllama", "dots1", "ernie4_5", "ernie4_5_moe", "exaone", "exaone4", "exaone_moe", "flex_olmo", "gemma",
    "gemma2", "gemma3_text", "gemma3n_text", "gemma4_text", "glm", "glm4", "glm4_moe", "glm4_moe_lite", "gpt2",
    "gpt_bigcode", "gpt_neox", "gptj", "granite", "granitemoe", "granitemoeshared", "helium", "hunyuan_v1_dense",
    "hunyuan_v1_moe", "hy_v3", "hyperclovax", "internlm3", "iquestcoder", "jais2", "kolibri1", "laguna", "llama",
    "llama4_text", "mellum", "minicpm3", "minimax_m2", "ministral", "ministral3", "mistral",
    "mixtral", "modernbert-decoder", "nanochat", "nemotron", "olmo", "olmo2", "olmo3", "olmoe", "opt", "persimmon",
    "phi", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "sarvam_mla", "sarvam_moe", "seed_oss",
    "smollm3", "solar_open", "stablelm", "starcoder2", "vaultgemma", "youtu",
))
# fmt: on
"""Families whose gates, circuits and explanations ``scripts/family_table.py`` has proven: see ``docs/families.md``."""

_REFUSED_SETTINGS = ("add_cross_attention", "use_bidirectional_attention")


def architecture_of(model: PreTrainedModel) -> Architecture:
    """Where the model keeps its attention.

    Raises:
        GossamerError: naming the family or the setting that cannot be gated right.
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
