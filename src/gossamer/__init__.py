"""gossamer: makes a trained transformer's attention sparse enough to read.

``add_gates`` puts gates on every attention link, ``remove_gates`` takes them off, ``save`` and ``load`` keep them,
``save_adapter`` and ``load_adapter`` keep what LoRA trained, ``gated_attention`` is the op itself. The ``gossamer``
command does the whole job.
"""

from gossamer.errors import GossamerError
from gossamer.models.attention import counted_links, forced_open, sampled_gates
from gossamer.models.checkpoint import load, save
from gossamer.models.convert import add_gates, is_gated, remove_gates
from gossamer.models.lora import as_dense, merge_adapters
from gossamer.models.lora_files import load_adapter, save_adapter
from gossamer.ops import GatedAttentionOutput, OpenLinks, gated_attention, open_links

__version__ = "0.1.0"

__all__ = [
    "GatedAttentionOutput",
    "GossamerError",
    "OpenLinks",
    "add_gates",
    "as_dense",
    "counted_links",
    "forced_open",
    "gated_attention",
    "is_gated",
    "load",
    "load_adapter",
    "merge_adapters",
    "open_links",
    "remove_gates",
    "sampled_gates",
    "save",
    "save_adapter",
]
