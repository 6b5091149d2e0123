"""Tiny random models of the main families, with the settings that distinguish each one."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

COMMON = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {**COMMON, "num_key_value_heads": 2, "head_dim": 8}
WINDOW = 5

CONFIGS: dict[str, tuple[str, dict]] = {
    "gpt2": (
        "gpt2",
        {"vocab_size": 97, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "bos_token_id": 1,
         "eos_token_id": 2, "pad_token_id": 0},
    ),
    "gpt2 scaled by layer": (
        "gpt2",
        {"vocab_size": 97, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "bos_token_id": 1,
         "eos_token_id": 2, "pad_token_id": 0, "scale_attn_by_inverse_layer_idx": True},
    ),
    "llama": ("llama", GROUPED),
    "gpt_neox": ("gpt_neox", COMMON),
    "gpt_neox serial": ("gpt_neox", {**COMMON, "use_parallel_residual": False}),
    "mistral": ("mistral", {**GROUPED, "sliding_window": WINDOW}),
    "qwen2": ("qwen2", {**GROUPED, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    "qwen3": ("qwen3", GROUPED),
    "gemma": ("gemma", GROUPED),
    "gemma2": (
        "gemma2",
        {**GROUPED, "sliding_window": WINDOW, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 16},
    ),
    "gemma3": ("gemma3_text", {**GROUPED, "sliding_window": WINDOW, "query_pre_attn_scalar": 16,
                               "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    "olmo2": ("olmo2", GROUPED),
    "phi3": ("phi3", {**GROUPED, "sliding_window": WINDOW}),
    "smollm3": ("smollm3", {**GROUPED, "no_rope_layers": [1, 0, 1]}),
    "granite": ("granite", {**GROUPED, "attention_multiplier": 0.3}),
    "opt": ("opt", {**COMMON, "ffn_dim": 48, "word_embed_proj_dim": 32}),
}  # fmt: skip


def tiny_config(name: str):
    """Create the config of a tiny model."""
    model_type, settings = CONFIGS[name]
    return AutoConfig.for_model(model_type, **settings)


def tiny_model(name: str, seed: int = 0) -> PreTrainedModel:
    """Create a tiny random model with eager attention; its weights are large enough for uneven attention."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(name), attn_implementation="eager")
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Create random token ids without padding."""
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(seed))
