"""Test which causal language models of the installed transformers gossamer can gate and decompose: docs/families.md.

Builds a tiny random model of every family, with biases, grouped queries and a sliding window where the family has
them, and checks:

    gates         with every gate open, left padding and a cache, the logits equal those of eager attention to 1e-5;
                  with hard gates, decoding in pieces from a cache gives the logits of a single pass; hard gates change
                  the logits; every layer has gates
    circuits      the residual stream minus the outputs of heads and MLPs is the same at all positions; keeping all
                  nodes gives the clean run, keeping none the corrupted run
    edges         the same for edges; cutting all edges of a node equals cutting the node
    explanations  keeping all links gives the prediction; the parts of a gate's logit sum to it to 1e-4, with biases set
                  to 0 so that nothing is left over

    python scripts/family_table.py [FAMILY ...]            prints the results
    python scripts/family_table.py --write                 writes docs/families.md
"""

import argparse
import inspect
import logging
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import gossamer
from gossamer.circuits.activation_cache import run_with_cache
from gossamer.circuits.intervention import run_with_edges, run_with_nodes
from gossamer.circuits.link_masks import LinkMasks
from gossamer.circuits.streams import graph_of
from gossamer.circuits.tasks.base import Batch
from gossamer.errors import GossamerError
from gossamer.explanations.effects import link_effects
from gossamer.explanations.prediction import Prediction
from gossamer.explanations.reasons import GateSplitter
from gossamer.files import atomic_write_text
from gossamer.models.architectures import architecture_of
from gossamer.models.proof import run_from_cache

TABLE = Path(__file__).parents[1] / "docs" / "families.md"
MOST_PARAMETERS = 3_000_000
VOCABULARY, LAYERS, WINDOW = 97, 3, 5

_SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "word_embed_proj_dim", "lru_width"), 32),
    **dict.fromkeys(
        ("intermediate_size", "n_inner", "ffn_dim", "d_ff", "dff", "ffn_hidden_size", "intermediate_size_mlp",
         "dense_intermediate_size", "decoder_ffn_dim"), 48,
    ),
    **dict.fromkeys(
        ("moe_intermediate_size", "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size",
         "shared_intermediate_size", "expert_ffn_hidden_size"), 24,
    ),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), LAYERS),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "swa_num_attention_heads"),
        4,
    ),
    **dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads", "num_global_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "swa_head_dim", "global_head_dim", "hidden_size_per_layer_input"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 64),
    **dict.fromkeys(("sliding_window", "attention_window_size", "attention_chunk_size"), WINDOW),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k"), 2),
    **dict.fromkeys(
        ("n_group", "topk_group", "first_k_dense_replace", "moe_layer_start_index", "num_dense_layers",
         "moe_num_shared_experts"), 1,
    ),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), 8),
    "index_topk": 4,
    "index_topk_blocks": 1,
    "index_block_size": 4,
    "query_pre_attn_scalar": 16,
    "rotary_dim": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
_LATENT = {"num_key_value_heads": 4, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "head_dim": 4}
_SPECIAL: dict[str, dict[str, Any]] = {
    "axk1": _LATENT,
    "deepseek_v2": {**_LATENT, "topk_method": "greedy", "num_experts_per_tok": 2},
    "deepseek_v3": _LATENT,
    "glm4_moe_lite": _LATENT,
    "minicpm3": _LATENT,
    "sarvam_mla": _LATENT,
    "youtu": _LATENT,
    "bamba": {"mamba_d_head": 16, "mamba_n_heads": 4, "attn_layer_indices": [1]},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("full_attention", "sliding_attention")
        }
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    },
    "deepseek_v32": _LATENT,
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "activation_sparsity_pattern": [0.0, 0.0, 0.0],
        "laurel_rank": 4,
    },
    "glm_moe_dsa": _LATENT,
    "gpt_neo": {"attention_types": [[["global"], 3]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba"], "mamba_n_heads": 4, "mamba_d_head": 16},
    "llama4_text": {"no_rope_layers": [1, 0, 1]},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse", "full_attention"]},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
}
"""Further settings that a family needs to be tiny, or to show its special features."""


@dataclass(frozen=True)
class Row:
    """The result for one family: for each feature a reason if it is not supported, None if it is."""

    family: str
    gates: str | None
    circuits: str | None = None
    edges: str | None = None
    explanations: str | None = None


def families() -> list[str]:
    """The families of causal language models that transformers' auto class lists."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(family: str, **settings: Any) -> PreTrainedConfig:
    """A configuration of the family with a few thousand parameters."""
    default = CONFIG_MAPPING[family]()
    names = set(inspect.signature(type(default).__init__).parameters) | set(default.to_dict())
    aliases = default.attribute_map
    given = {}
    for name in names | set(aliases):
        if name in _SIZES and (_is_set(default, name) or name.endswith("token_id")):
            given[name] = _SIZES[name]
    given = {name: value for name, value in given.items() if aliases.get(name) not in given}
    for name in ("layer_types", "mlp_layer_types", "layers_block_type"):  # some of each kind
        kinds = list(dict.fromkeys(getattr(default, name, None) or ()))
        if len(kinds) > 1:
            given[name] = [kinds[layer % len(kinds)] for layer in range(LAYERS)]
    inner = getattr(getattr(default, "text_config", None), "model_type", None)
    if inner in CONFIG_MAPPING:
        given["text_config"] = tiny_config(inner).to_dict()
    return AutoConfig.for_model(family, **given | _SPECIAL.get(family, {}) | settings)


def _is_set(config: PreTrainedConfig, name: str) -> bool:
    try:
        return getattr(config, name, None) is not None
    except RuntimeError:  # a per-layer setting
        return True


def tiny_model(family: str, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """A random model of the family with eager attention and weights large enough to make attention uneven.

    Raises:
        ValueError: if it has too many parameters even with all sizes small.
    """
    config = tiny_config(family, **settings)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"{size:,} parameters with all sizes small")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager")
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    return model.eval().requires_grad_(False)


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random token ids, none of them special."""
    return torch.randint(3, 80, (batch, length), generator=torch.Generator().manual_seed(seed))


class Different(Exception):
    """A failed check."""


def check_gates(dense: PreTrainedModel) -> None:
    """Check the gates of a model as described in the module docstring.

    Raises:
        Different: saying what differs, and by how much.
        GossamerError: if the model is refused.
    """
    gated = gossamer.add_gates(dense)
    ids, mask = tokens(2, 14), torch.ones(2, 14, dtype=torch.long)
    mask[1, :5] = 0
    wanted = dense(input_ids=ids, attention_mask=mask).logits
    with gossamer.forced_open(gated), gossamer.counted_links(gated) as counts:
        found = gated(input_ids=ids, attention_mask=mask).logits
    if len(counts) != dense.config.num_hidden_layers:
        raise Different(f"gates in {len(counts)} of {dense.config.num_hidden_layers} layers")
    _near("forced open", found[mask.bool()], wanted[mask.bool()], 1e-5)
    options = {"attention_mask": mask, "max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    wanted = dense.generate(ids, **options).logits
    with gossamer.forced_open(gated):
        found = gated.generate(ids, **options).logits
    _near("forced open from a cache", torch.stack(found), torch.stack(wanted), 1e-5)
    whole = gated(input_ids=ids, use_cache=False).logits
    first = gated(input_ids=ids[:, :10], use_cache=True)
    rest = run_from_cache(gated, ids[:, 10:], first)
    _near("hard gates from a cache", rest, whole[:, 10:], 1e-5)
    if (whole - dense(input_ids=ids).logits).abs().max() < 1e-3:
        raise Different("hard gates change nothing")


def check_circuits(dense: PreTrainedModel) -> None:
    """Check residual streams and nodes of a gated model as described in the module docstring.

    Raises:
        Different, GossamerError: as :func:`check_gates`.
    """
    model, batch = gossamer.add_gates(dense, gate_bias=0.3).double().eval(), _batch()
    graph, cache = graph_of(model), run_with_cache(model, batch.clean)
    for (kind, layer), stream in cache.read.items():
        rest = cache.constant(graph, kind, layer)
        _near(f"what nothing wrote before {kind} of layer {layer}", rest, rest[:1, :1].expand_as(rest), 1e-5, stream)
    nodes = torch.ones(graph.sources, dtype=torch.bool)
    clean, corrupted = (batch.measure(model(input_ids=ids).logits[:, -1]) for ids in (batch.clean, batch.corrupted))
    _near("nodes kept", run_with_nodes(model, batch, nodes), clean, 1e-5)
    _near("no nodes kept", run_with_nodes(model, batch, ~nodes), corrupted, 1e-5)


def _batch() -> Batch:
    answers, wrong = ((torch.tensor([first]), torch.tensor([first + 1])) for first in (5, 40))
    return Batch(tokens(2, 6), tokens(2, 6, seed=1), answers, wrong, "logit_difference")


def check_edges(dense: PreTrainedModel) -> None:
    """Check edges of a gated model as described in the module docstring.

    Raises:
        Different, GossamerError: as :func:`check_gates`.
    """
    model, batch = gossamer.add_gates(dense, gate_bias=0.3).double().eval(), _batch()
    graph = graph_of(model)
    possible, nodes = graph.possible(), torch.ones(graph.sources, dtype=torch.bool)
    clean, corrupted = (batch.measure(model(input_ids=ids).logits[:, -1]) for ids in (batch.clean, batch.corrupted))
    _near("edges kept", run_with_edges(model, batch, possible), clean, 1e-5)
    _near("no edges kept", run_with_edges(model, batch, torch.zeros_like(possible)), corrupted, 1e-5)
    nodes[[graph.head(0, 1), graph.head(1, 2), graph.mlp(1)]] = False
    edges = possible & nodes[:, None]
    _near("edges of nodes", run_with_edges(model, batch, edges), run_with_nodes(model, batch, nodes), 1e-5)


def check_explanations(dense: PreTrainedModel) -> None:
    """Check a prediction with all links kept, and the parts of gate logits, as described in the module docstring.

    Raises:
        Different, GossamerError: as :func:`check_gates`.
    """
    model = gossamer.add_gates(dense, gate_bias=0.5).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") and not name.endswith("gate_bias"):
            parameter.zero_()
    ids = tuple(range(5, 14))
    masks = LinkMasks(model, Prediction(ids, target=20))
    everything = torch.ones(len(masks), dtype=torch.bool)
    kept = masks.kept([everything])
    _near("links kept", kept, torch.ones(1), 1e-3)
    link_effects(masks, everything, torch.arange(2))
    splitter = GateSplitter(model, ids)
    for layer in range(model.config.num_hidden_layers):
        for split in splitter.split(layer, [(0, 8, 8), (3, 8, 6), (3, 5, 2)]):
            for parts in (split.parts, split.parts[:-1, :-1]):
                _near(f"parts in layer {layer}", parts.sum(), torch.tensor(split.logit), 1e-4)


def _near(
    what: str, found: torch.Tensor, wanted: torch.Tensor, tolerance: float, of: torch.Tensor | None = None
) -> None:
    scale = max(1.0, float((wanted if of is None else of).abs().max()))
    error = float((found - wanted).abs().max()) / scale
    if not error <= tolerance:
        raise Different(f"{what}: {error:.0e} off")


def row_of(family: str) -> Row:
    """Build a tiny model of the family and check it."""
    try:
        model = tiny_model(family)
    except Exception as error:
        return Row(family, _refusal(family) or f"not tried: no tiny model of it can be built ({type(error).__name__})")
    reasons: list[str | None] = []
    for check in (check_gates, check_circuits, check_edges, check_explanations):
        reasons.append(_reason(check, model))
        if reasons[0] is not None:
            return Row(family, reasons[0])
    return Row(family, *reasons)


def _refusal(family: str) -> str | None:
    """Why a family is refused that has no tiny model, found with a model on the meta device."""
    for make in (tiny_config, lambda name: CONFIG_MAPPING[name]()):
        try:
            with torch.device("meta"):
                architecture_of(AutoModelForCausalLM.from_config(make(family)))
        except GossamerError as error:
            return _first_line(error)
        except Exception:
            continue
    return None


@torch.no_grad()
def _reason(check: Callable[[PreTrainedModel], None], model: PreTrainedModel) -> str | None:
    try:
        check(model)
    except (Different, GossamerError) as error:
        return _first_line(error)
    except Exception as error:
        return f"{type(error).__name__}: {_first_line(error)}"
    return None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


_INTRODUCTION = """# Families of models

Which causal language models of transformers {version} gossamer can gate, and of which it can make circuits and
explanations. `python scripts/family_table.py --write` made this page: it builds every family that
`AutoModelForCausalLM` lists with a tiny random configuration and runs it; what is claimed here was measured.

- **Gates**: with every gate open, padding on the left and a cache, the logits are those of eager attention to 1e-5;
  hard gates give the same from a cache, in pieces, as at once; every layer has gates that act.
- **Circuits**: streams are the sum of what heads and MLPs write; *nodes* and *links* need no more. *Edges* need that
  queries, keys and values are projections of the stream, so that each head's can be patched alone.
- **Explanations**: the parts of a gate's logit, by the heads and MLPs upstream that wrote them, add up to it to 1e-4.

A model of a family that is not listed is looked through for the same modules under the same names, and proven when
`gossamer.add_gates` puts gates in: it is run on a few tokens with gates and without. If that does not come out equal,
or a part is not known, it is refused with the reason.

## Supported

| family | circuits | explanations |
|---|---|---|
"""


def table(rows: Iterable[Row]) -> str:
    """The text of docs/families.md."""
    rows = sorted(rows, key=lambda row: row.family)
    lines = [_INTRODUCTION.format(version=transformers.__version__)]
    for row in rows:
        if row.gates is None:
            circuits = "nodes, edges, links" if row.edges is None else "nodes, links"
            reason = None if row.circuits is None else f"no: {_clause(row, row.circuits)}"
            explained = "yes" if row.explanations is None else f"no: {_clause(row, row.explanations)}"
            lines.append(f"| {row.family} | {reason or circuits} | {'no' if reason else explained} |\n")
    lines.append("\n## Refused\n\n| family | reason |\n|---|---|\n")
    lines += [f"| {row.family} | {_clause(row, row.gates)} |\n" for row in rows if row.gates is not None]
    return "".join(lines)


def _clause(row: Row, reason: str) -> str:
    """A reason without the parts that the table already states."""
    return reason.split(", so its ")[0].removeprefix(f"{row.family} ").replace("|", "\\|")


def quietly() -> None:
    """Silence the warnings about unusually small models."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="all if none are named")
    parser.add_argument("--write", action="store_true", help="write docs/families.md")
    arguments = parser.parse_args()
    quietly()
    found = []
    for family in arguments.families or families():
        found.append(row_of(family))
        print(*(f"{name}: {value or 'yes'}" for name, value in asdict(found[-1]).items()), sep="; ", flush=True)
    if arguments.write and not arguments.families:
        atomic_write_text(TABLE, table(found))
