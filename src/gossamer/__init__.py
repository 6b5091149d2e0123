"""gossamer: make a trained transformer's attention sparse enough to read.

``add_gates`` adds a gate to every attention link and ``remove_gates`` removes the gates. ``save`` and ``load`` store
gated models, ``save_adapter`` and ``load_adapter`` store LoRA adapters, and ``push_to_hub`` uploads either. ``explain``
finds the links that carry a prediction. ``gated_attention`` is the op itself. The ``gossamer`` command does all of it.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gossamer.errors import GossamerError
    from gossamer.explanations.config import ExplainConfig
    from gossamer.explanations.explain import Explanation, explain
    from gossamer.models.attention import counted_links, forced_open, sampled_gates
    from gossamer.models.checkpoint import load, save
    from gossamer.models.convert import add_gates, is_gated, remove_gates
    from gossamer.models.hub import push_to_hub
    from gossamer.models.lora import as_dense, merge_adapters
    from gossamer.models.lora_files import load_adapter, save_adapter
    from gossamer.models.tokenizers import load_tokenizer
    from gossamer.ops import GatedAttentionOutput, OpenLinks, gated_attention, open_links

__version__ = "0.1.0"

__all__ = [
    "ExplainConfig",
    "Explanation",
    "GatedAttentionOutput",
    "GossamerError",
    "OpenLinks",
    "add_gates",
    "as_dense",
    "counted_links",
    "explain",
    "forced_open",
    "gated_attention",
    "is_gated",
    "load",
    "load_adapter",
    "load_tokenizer",
    "merge_adapters",
    "open_links",
    "push_to_hub",
    "remove_gates",
    "sampled_gates",
    "save",
    "save_adapter",
]

_MODULES = {
    "ExplainConfig": "gossamer.explanations.config",
    "Explanation": "gossamer.explanations.explain",
    "GatedAttentionOutput": "gossamer.ops",
    "GossamerError": "gossamer.errors",
    "OpenLinks": "gossamer.ops",
    "add_gates": "gossamer.models.convert",
    "as_dense": "gossamer.models.lora",
    "counted_links": "gossamer.models.attention",
    "explain": "gossamer.explanations.explain",
    "forced_open": "gossamer.models.attention",
    "gated_attention": "gossamer.ops",
    "is_gated": "gossamer.models.convert",
    "load": "gossamer.models.checkpoint",
    "load_adapter": "gossamer.models.lora_files",
    "load_tokenizer": "gossamer.models.tokenizers",
    "merge_adapters": "gossamer.models.lora",
    "open_links": "gossamer.ops",
    "push_to_hub": "gossamer.models.hub",
    "remove_gates": "gossamer.models.convert",
    "sampled_gates": "gossamer.models.attention",
    "save": "gossamer.models.checkpoint",
    "save_adapter": "gossamer.models.lora_files",
}


class _Public:
    """A public name, imported on first use because torch and transformers take seconds to load.

    This is a descriptor on the package's class instead of a module ``__getattr__``: nnsight gives every object an
    attribute ``save``, so ``__getattr__`` would never be called for it.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, package: ModuleType, _: type) -> Any:
        value = getattr(import_module(_MODULES[self.name]), self.name)
        setattr(package, self.name, value)
        return value


class _Package(ModuleType):
    def __dir__(self) -> list[str]:
        return sorted({*self.__dict__, *__all__})


for _name in _MODULES:
    setattr(_Package, _name, _Public(_name))
sys.modules[__name__].__class__ = _Package
