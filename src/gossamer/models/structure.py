"""Locate the parts of a decoder by the names of its modules.

The decoders in transformers share a small set of module names across families; all family-specific knowledge in
gossamer is here. A name says where a part is, not how the layer uses it. That is tested for the families in
:data:`PROVEN` and checked for any other by :mod:`gossamer.models.proof`.
"""

import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from transformers import PreTrainedModel

from gossamer.errors import GossamerError

# fmt: off
PROVEN = frozenset((
    "afmoe", "apertus", "apertus1p5_text", "arcee", "aria_text", "axk1", "biogpt", "bitnet", "codegen", "cohere",
    "cohere2", "cohere2_moe", "cohere_compass_text", "ctrl", "cwm", "dbrx", "deepseek_v2", "deepseek_v3",
    "dots1", "ernie4_5", "ernie4_5_moe", "exaone", "exaone4", "exaone_moe", "flex_olmo", "gemma",
    "gemma2", "gemma3_text", "gemma3n_text", "gemma4_text", "glm", "glm4", "glm4_moe", "glm4_moe_lite", "gpt2",
    "gpt_bigcode", "gpt_neox", "gptj", "granite", "granitemoe", "granitemoeshared", "helium", "hunyuan_v1_dense",
    "hunyuan_v1_moe", "hy_v3", "hyperclovax", "internlm3", "iquestcoder", "jais2", "kolibri1", "laguna", "llama",
    "llama4_text", "mellum", "minicpm3", "minimax_m2", "ministral", "ministral3", "mistral",
    "mixtral", "modernbert-decoder", "nanochat", "nemotron", "olmo", "olmo2", "olmo3", "olmoe", "opt", "persimmon",
    "phi", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "sarvam_mla", "sarvam_moe", "seed_oss",
    "smollm3", "solar_open", "stablelm", "starcoder2", "vaultgemma", "youtu",
))
# fmt: on
"""Families whose gates, circuits and explanations ``scripts/family_table.py`` has tested: see ``docs/families.md``."""

_LAYERS = ("layers", "h", "blocks", "decoder.layers", "model.layers")
_ATTENTION = ("self_attn", "attn", "attention", "self_attention", "multi_head_attention", "norm_attn_norm.attn")
_PROJECTIONS = (
    ("q_proj", "k_proj", "v_proj"),
    ("Wq", "Wk", "Wv"),
    ("qkv_proj",),
    ("c_attn",),
    ("Wqkv",),
    ("query_key_value",),
    ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"),
    ("q_proj", "kv_a_proj_with_mqa", "kv_b_proj"),
)
_OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj", "Wo")
_MLPS = (("mlp",), ("feed_forward",), ("ffn",), ("block_sparse_moe", "shared_mlp"), ("block_sparse_moe",))
_FINAL_NORMS = (
    "norm", "final_layernorm", "ln_f", "final_layer_norm", "layer_norm", "final_norm", "embedding_norm", "layernorm",
    "norm_f",
)  # fmt: skip

# The norms of a layer, None if absent: before attention, after it, before the MLP, after it.
_NORMS: tuple[tuple[str | None, str | None, str | None, str | None], ...] = (
    ("input_layernorm", None, "post_attention_layernorm", None),
    ("input_layernorm", None, "pre_feedforward_layernorm", None),
    ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"),
    ("input_layernorm", "post_attention_layernorm", "pre_mlp_layernorm", "post_mlp_layernorm"),
    ("input_layernorm", "post_norm1", "post_attention_layernorm", "post_norm2"),
    (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    ("attention_layernorm", None, "feedforward_layernorm", None),
    ("operator_norm", None, "ffn_norm", None),
    ("attn_norm", None, "mlp_norm", None),
    ("layernorm1", None, "layernorm2", None),
    ("ln_1", None, "ln_2", None),
    ("norm_attn_norm.norm_1", None, "norm_attn_norm.norm_2", None),
)
_SHARED_NORMS = ("input_layernorm", "ln_1")
# Layers that hold the two linear maps of the MLP directly.
_OPEN_MLP = ("self_attn_layer_norm", "final_layer_norm", "fc1", "fc2")

_MULTIPLIERS = ("residual_multiplier", "residual_scale")
_NORMS_OF_HEADS = frozenset(
    ("q_norm", "k_norm", "q_layernorm", "k_layernorm", "query_layernorm", "key_layernorm", "qk_norm", "q_a_layernorm",
     "kv_a_layernorm")
)  # fmt: skip
_WITHOUT_WEIGHTS = ("Dropout", "Activation", "Rotary", "SiLU", "ReLU", "GELU")


@dataclass(frozen=True)
class Branches:
    """The modules of a layer that first read the residual stream, and those whose output is added to it.

    Attributes:
        attention_in, attention_out: first and last module of the attention branch; a norm, or attention itself.
        mlp_in: first module of the MLP branch; with ``shared_norm`` the MLP itself.
        mlp_out: last modules of the MLP branch; the outputs of several are summed.
        parallel: whether the MLP reads the same stream as attention, without attention's output.
        shared_norm: whether the MLP also shares attention's norm.
        multiplier: factor on both outputs.
    """

    attention_in: str
    attention_out: str
    mlp_in: str
    mlp_out: tuple[str, ...]
    parallel: bool = False
    shared_norm: bool = False
    multiplier: float = 1.0


@dataclass(frozen=True)
class Architecture:
    """Paths of the layers, attention, projections and norms of a model.

    Attributes:
        layers: path of the list of decoder layers, from the causal language model.
        attention: path of the attention module within a layer.
        projections: names of the linear maps within the attention module, the output projection last.
        final_norm: path of the norm before the unembedding, from the causal language model.
        branches: where the residual stream is read and written; None if unknown.
        clip: absolute value at which queries, keys and values are clipped; None for no clipping.
        opaque: why the residual stream cannot be decomposed: a clause about the family, or None.
    """

    layers: str
    attention: str
    projections: tuple[str, ...]
    final_norm: str | None
    branches: Branches | None
    clip: float | None
    opaque: str | None


_FOUND: "WeakKeyDictionary[PreTrainedModel, Architecture]" = WeakKeyDictionary()


def structure_of(model: PreTrainedModel) -> Architecture:
    """The architecture of a decoder; computed once per model.

    Raises:
        GossamerError: naming the family and what gossamer cannot find or gate in it.
    """
    if model not in _FOUND:
        _FOUND[model] = _find(model)
    return _FOUND[model]


def norms_of_heads(attention: nn.Module) -> list[nn.Module]:
    """The query and key norms within an attention module."""
    return [attention.get_submodule(name) for name in _NORMS_OF_HEADS if _has(attention, name)]


def attention_modules(model: PreTrainedModel) -> Iterator[nn.Module]:
    """The attention modules of a supported model, from the first layer to the last."""
    architecture = structure_of(model)
    for layer in model.get_submodule(architecture.layers):
        yield layer.get_submodule(architecture.attention)


def hands_arguments_on(layer: nn.Module) -> bool:
    """Whether a layer passes further keyword arguments on to its attention, judged by its source; True if unknown."""
    try:
        return inspect.getsource(inspect.unwrap(type(layer).forward)).count("**kwargs") != 1
    except (OSError, TypeError):
        return True


def _find(model: PreTrainedModel) -> Architecture:
    family, config = model.config.model_type, model.config
    path, layers = _layers(model)
    name, modules = _attention(model, layers)
    attention = modules[0]
    inputs = next((names for names in _PROJECTIONS if all(_has(attention, each) for each in names)), None)
    output = next((each for each in _OUTPUTS if _has(attention, each)), None)
    if inputs is None or output is None:
        held = ", ".join(child for child, _ in attention.named_children())
        raise GossamerError(f"{family} has queries, keys and values from other projections than gossamer knows: {held}")
    _refuse_uneven_heads(config, modules, output)
    decoder = path.rpartition(".")[0]
    norms = (f"{decoder}.{each}" for each in _FINAL_NORMS if _has(model.get_submodule(decoder), each))
    final_norm = next(norms, None)
    branches, opaque = _branches_of_all(config, layers, name)
    beside = (_beside_heads(module, (*inputs, output)) for module in modules)
    opaque = opaque or next(filter(None, beside), None)
    if final_norm is None:
        opaque = "has no norm before its unembedding under a name that gossamer knows"
    if getattr(config, "do_layer_norm_before", True) is False:
        opaque = "with do_layer_norm_before=False has no plain residual stream"
    clip = getattr(attention, "clip_qkv", getattr(config, "clip_qkv", None))
    return Architecture(path, name, (*inputs, output), final_norm, branches, clip, opaque)


def _attention(model: PreTrainedModel, layers: nn.ModuleList) -> tuple[str, list[nn.Module]]:
    """The path of attention within a layer, and the attention modules of all layers."""
    family = model.config.model_type
    name = next((name for name in _ATTENTION if any(_has(layer, name) for layer in layers)), None)
    if name is None:
        _require_interface(family, type(model))
        raise GossamerError(f"{family} has no attention in its layers under a name that gossamer knows")
    _refuse_other_mixers(family, layers, name)
    modules = [layer.get_submodule(name) for layer in layers]
    kinds = {type(module).__name__ for module in modules}
    if len(kinds) > 1:
        raise GossamerError(f"the layers of {family} have attention of different kinds: {', '.join(sorted(kinds))}")
    first = modules[0]
    if isinstance(first, nn.ModuleList):
        raise GossamerError(f"a layer of {family} has {len(first)} attention modules, where gates know one")
    _require_interface(family, type(first).forward)
    if hasattr(first, "gate_bias") and not hasattr(first, "gate_state"):
        raise GossamerError(f"the attention of {family} has a gate_bias of its own, where the gates' biases would be")
    if any(_has(module, "indexer") for module in modules):
        raise GossamerError(f"an indexer in the attention of {family} chooses keys, past any gate")
    if any("sink" in part for module in modules for part, _ in module.named_parameters()):
        raise GossamerError(f"{family} has attention sinks, which take part in the softmax without being tokens")
    return name, modules


def _refuse_uneven_heads(config: Any, modules: list[nn.Module], output: str) -> None:
    try:
        counts = {_heads(module, output, config.hidden_size) for module in modules}
        uneven = len(counts) > 1 or not config.num_attention_heads
    except RuntimeError:  # the number of heads is set per layer, not for the model
        uneven = True
    if uneven:
        raise GossamerError(f"the layers of {config.model_type} have different numbers of heads")


def _branches_of_all(config: Any, layers: nn.ModuleList, attention: str) -> tuple[Branches | None, str | None]:
    found = {_branches(config, layer, attention) for layer in layers}
    if len(found) == 1:
        return found.pop()
    return None, next((reason for _, reason in found if reason), "has layers whose parts are not the same")


def _refuse_other_mixers(family: str, layers: nn.ModuleList, attention: str) -> None:
    """Raise if layers move information between tokens by anything other than the attention of that name."""
    others = [layer for layer in layers if not _has(layer, attention)]
    if others:
        held = ", ".join(child for child, _ in others[0].named_children())
        raise GossamerError(f"some layers of {family} have no attention (but {held}), so tokens mix past any gate")
    for name, module in layers.named_modules():
        if isinstance(module, nn.Conv1d):
            path = name.partition(".")[2]
            raise GossamerError(f"the layers of {family} mix tokens by a convolution ({path}) too, past any gate")
    children = (name for layer in layers for name, _ in layer.named_children())
    cross = next((name for name in children if "encoder_attn" in name or "cross" in name), None)
    if cross is not None:
        raise GossamerError(f"the layers of {family} attend to an encoder too ({cross}); gossamer gates decoders alone")


def _has(module: nn.Module, path: str) -> bool:
    try:
        return module.get_submodule(path) is not None
    except AttributeError:
        return False


def _heads(attention: nn.Module, output: str, width: int) -> int:
    """Number of heads that the output projection reads, if the module gives the head size; else its input width."""
    size = getattr(attention, "v_head_dim", None) or getattr(attention, "head_dim", None) or 1
    weight = getattr(attention.get_submodule(output), "weight", None)
    return 0 if weight is None else int(weight.numel()) // width // int(size)


def _layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    base = model.base_model
    for path in _LAYERS:
        found = base.get_submodule(path) if _has(base, path) else None
        if isinstance(found, nn.ModuleList) and len(found):
            return next(name for name, module in model.named_modules() if module is found), found
    family = model.config.model_type
    if _has(base, "language_model"):
        raise GossamerError(
            f"{family} holds a language model beside other towers; gossamer gates language models alone"
        )
    _require_interface(family, type(model))
    if _has(base, "encoder"):
        raise GossamerError(f"{family} is an encoder, with or without a decoder; gossamer gates decoders only")
    raise GossamerError(f"{family} has no list of decoder layers under a name that gossamer knows")


def _require_interface(family: str, code: Any) -> None:
    """Raise if attention does not call transformers' interface, or calls it twice.

    ``code`` is a function, or a model class, for which the source of its whole module is read.
    """
    try:
        source = inspect.getsource(sys.modules[code.__module__] if inspect.isclass(code) else inspect.unwrap(code))
    except (OSError, TypeError, KeyError):  # no source available: only running it can tell
        return
    if "ALL_ATTENTION_FUNCTIONS" not in source:
        raise GossamerError(
            f"{family} does not call transformers' attention interface, so gates would do nothing in it"
        )
    if not inspect.isclass(code) and source.count("attention_interface(") > 1:
        raise GossamerError(f"attention of {family} is made of several, so that a link has no weight of its own")


def _branches(config: Any, layer: nn.Module, attention: str) -> tuple[Branches | None, str | None]:
    """Where the residual stream is read and written in a layer, or a clause that says why this is unknown."""
    outer, _, _ = attention.rpartition(".")
    children = [*layer.named_children()]
    if outer:
        children += [(f"{outer}.{name}", module) for name, module in layer.get_submodule(outer).named_children()]
    parts = {name for name, module in children if not _is_passive(module)} - {attention, outer}
    multiplier = next((float(getattr(layer, name)) for name in _MULTIPLIERS if hasattr(layer, name)), 1.0)
    if parts == set(_OPEN_MLP):
        attention_norm, mlp_norm, _, last = _OPEN_MLP
        return Branches(attention_norm, attention, mlp_norm, (last,), multiplier=multiplier), None
    mlp = next((names for names in _MLPS if parts.issuperset(names)), None)
    if mlp is None:
        return None, f"has no MLP in its layers under a name that gossamer knows ({', '.join(sorted(parts))})"
    parallel = bool(getattr(config, "use_parallel_residual", False))
    norms = parts - set(mlp)
    if len(norms) == 1 and next(iter(norms)) in _SHARED_NORMS:
        (norm,) = norms
        return Branches(norm, attention, mlp[0], mlp, parallel=True, shared_norm=True, multiplier=multiplier), None
    for before, after, before_mlp, after_mlp in _NORMS:
        if norms == {before, after, before_mlp, after_mlp} - {None}:
            written = mlp if after_mlp is None else (after_mlp,)
            found = Branches(
                before or attention, after or attention, before_mlp or mlp[0], written, parallel, multiplier=multiplier
            )
            return found, None
    return None, f"has layers with parts that gossamer does not know: {', '.join(sorted(norms))}"


def _is_passive(module: nn.Module) -> bool:
    return any(word in type(module).__name__ for word in _WITHOUT_WEIGHTS) and not list(module.parameters())


def _beside_heads(attention: nn.Module, projections: tuple[str, ...]) -> str | None:
    """A clause naming other modules in attention, which may read the stream or act between heads and projection."""
    children = [name for name, module in attention.named_children() if not _is_passive(module)]
    others = [name for name in children if name not in projections and name not in _NORMS_OF_HEADS]
    return f"has {', '.join(others)} in its attention beside the projections" if others else None
