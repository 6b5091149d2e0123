"""Save and load gated models.

A saved model is a directory:

    config.json             model_type "gossamer", so that no transformers class loads it as a dense model
    base_config.json        the dense model's config
    gossamer*.safetensors   all weights and the gate biases
    tokenizer files, generation_config.json, README.md (the model card)

``AutoModelForCausalLM.from_pretrained`` fails on the unknown model type, and a specific model class fails because
there is no ``model.safetensors``.
"""

import json
import os
import re
from pathlib import Path
from typing import Any, TypedDict, cast

import torch
import yaml
from accelerate.utils import extract_model_from_parallel
from huggingface_hub import save_torch_state_dict
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from gossamer.errors import GossamerError
from gossamer.files import atomic_directory
from gossamer.inputs import check, check_tensors, read_json, read_tensors, reading
from gossamer.models.architectures import attention_modules
from gossamer.models.convert import add_gates, is_gated
from gossamer.models.lora import has_adapters
from gossamer.models.repositories import MODEL_TYPE, found_folder
from gossamer.models.whole import OPTIONS, check_whole, quiet_loading
from gossamer.names import HUB_IDS, SMOLLM2_SPARSE

AGAIN = "save the model anew with gossamer.save"

FORMAT = 1
"""Version of the directory layout."""

WRAPPER = re.compile(r"^(?:module\.|_orig_mod\.)+|(?<=\.)_orig_mod\.")
"""Prefixes that data parallelism and torch.compile add to weight names."""

_CARD = """
# A sparse-attention model made with gossamer

A {family} model with hard on/off gates on its attention links. The weights were trained under these gates
and mean nothing without them. Plain transformers refuses this directory: the model type `gossamer` is
unknown to it and there is no `model.safetensors`. The one line that loads it:

    model = gossamer.load("path/to/this/directory")

`gossamer.remove_gates(model)` takes the gates off, which leaves a model with a much higher loss.
"""


def save(
    model: PreTrainedModel,
    path: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    replace: bool = True,
) -> None:
    """Write a gated model to a directory; :func:`load` restores it with the same logits.

    Args:
        model: a gated model, possibly wrapped by torch.compile or data parallelism.
        path: the directory.
        tokenizer: saved along if given.
        replace: replace an existing directory atomically; if False, an existing directory is an error.

    Raises:
        GossamerError: if the model has no gates, has adapters, or has offloaded layers; if the directory cannot be
            written, or exists and ``replace`` is False.
    """
    model = unwrapped(model)
    if has_adapters(model):
        raise GossamerError(
            "this model has adapters: gossamer.save_adapter(model, path) saves those and the gates alone, "
            "gossamer.merge_adapters(model) adds them to its weights"
        )
    with atomic_directory(Path(path), replace=replace) as staging:
        write_model(model, staging, tokenizer)


def unwrapped(model: PreTrainedModel) -> PreTrainedModel:
    """The model inside the wrappers of torch.compile and data parallelism."""
    inner = extract_model_from_parallel(model, keep_torch_compile=False)
    return model if inner is model else unwrapped(inner)


def write_model(
    model: PreTrainedModel,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    state_dict: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write the files of :func:`save` into an existing folder.

    ``state_dict`` holds the full weights if those of the model are sharded over several processes.
    """
    if not is_gated(model):
        raise GossamerError("this model has no gates; save a dense model with save_pretrained")
    config = model.config.to_dict()
    base = config.pop("_name_or_path", None) or model.config.name_or_path or "unknown"
    base = os.path.abspath(base) if os.path.isdir(base) else base
    config.pop("quantization_config", None)
    config["architectures"] = [type(model).__name__]
    outer = {"model_type": MODEL_TYPE, "format": FORMAT, "base_model_type": model.config.model_type, "base": base}
    (folder / "config.json").write_text(json.dumps(outer, indent=2) + "\n")
    (folder / "base_config.json").write_text(json.dumps(config, indent=2, default=str) + "\n")
    card = front_matter("gossamer", base) + _CARD.format(family=model.config.model_type)
    (folder / "README.md").write_text(card, encoding="utf-8")
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    tensors = model.state_dict() if state_dict is None else {n: _own_storage(t) for n, t in state_dict.items()}
    tensors = {unwrapped_name(name): tensor for name, tensor in tensors.items()}
    if offloaded := [name for name, tensor in tensors.items() if tensor.is_meta]:
        raise GossamerError(f"this model has layers that are offloaded ({offloaded[0]}); load it whole to save it")
    save_torch_state_dict(tensors, folder, filename_pattern="gossamer{suffix}.safetensors")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def front_matter(library: str, base: str, **more: list[str]) -> str:
    """YAML front matter of a model card; names the dense model unless that is unknown or a local directory."""
    facts: dict[str, Any] = {"library_name": library}
    if base != "unknown" and not is_local_model(base):
        facts["base_model"] = HUB_IDS.get(base, base)
    return f"---\n{yaml.safe_dump({**facts, **more}, sort_keys=False, allow_unicode=True)}---\n"


def is_local_model(name: str) -> bool:
    """Whether a model name is a local path."""
    return name.startswith(("/", ".", "~")) or os.path.isdir(name)


def unwrapped_name(name: str) -> str:
    """The name of a weight without the prefixes that torch.compile and data parallelism add."""
    return WRAPPER.sub("", name)


def _own_storage(tensor: torch.Tensor) -> torch.Tensor:
    # A tensor gathered from several processes may be a view of a padded buffer, which safetensors refuses.
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def load(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    revision: str | None = None,
) -> PreTrainedModel:
    """Load a gated model that :func:`save` wrote, including its gates, in ``eval()`` mode.

    Args:
        path: the directory; the id of a repository on the Hub, ``org/name``; or ``smollm2-sparse``, the model that
            comes with gossamer. If it holds adapters, they are merged into the dense model that they name.
        dtype: of the weights; as saved if None.
        device: where to put them.
        revision: branch, tag or commit on the Hub; the main branch if None.

    Raises:
        GossamerError: if there is no such directory or repository, or it does not hold a complete gossamer model.
    """
    if str(path) == SMOLLM2_SPARSE and not os.path.exists(path):
        from gossamer.models.shipped import load_shipped  # imports this module indirectly

        return load_shipped(SMOLLM2_SPARSE)[0].to(device, dtype)
    folder = found_folder(path, revision)
    if is_run(folder):
        raise GossamerError(f"{folder} is a run, not a saved model; its sparse model is in {folder / 'model'}")
    if (folder / "adapter_config.json").exists():
        from gossamer.models.lora_files import load_adapter  # imports this module

        return load_adapter(folder).to(device, dtype)
    outer = _read_json(folder / "config.json", folder)
    if outer.get("model_type") != MODEL_TYPE:
        kind = f"a dense {outer['model_type']} model" if "model_type" in outer else "no model"
        raise GossamerError(f"{folder} holds {kind}, not a gossamer one")
    if outer.get("format") != FORMAT:
        raise GossamerError(f"{folder} has format {outer.get('format')}; this version of gossamer reads {FORMAT}")
    config = base_config(folder)
    weights = read_weights(folder)
    gates = {name: weights.pop(name) for name in list(weights) if name.endswith(".gate_bias")}
    model = _dense_model(folder, config, weights, dtype)
    model.config.name_or_path = str(outer.get("base", "unknown"))
    model = add_gates(model, inplace=True)
    with reading(folder, AGAIN):
        named = {name: module for name, module in model.named_modules() if hasattr(module, "gate_bias")}
        check_tensors(gates, {f"{name}.gate_bias": module.gate_bias.shape for name, module in named.items()})
    model.load_state_dict(gates, strict=False)
    return model.to(device).eval()


def _dense_model(
    folder: Path, config: PreTrainedConfig, weights: dict[str, torch.Tensor], dtype: torch.dtype | None
) -> PreTrainedModel:
    """The dense model that the gates are added to."""
    saved = next((tensor.dtype for tensor in weights.values() if tensor.is_floating_point()), None)
    with reading(folder, AGAIN), quiet_loading():
        model_class = AutoModelForCausalLM._model_mapping[type(config)]
        model, found = model_class.from_pretrained(
            None, config=config, state_dict=weights, dtype=dtype or saved, **OPTIONS
        )
        if (folder / "generation_config.json").exists():
            model.generation_config = GenerationConfig.from_pretrained(folder)
    check_whole(model, found, str(folder))
    return cast(PreTrainedModel, model)


def base_config(folder: Path) -> PreTrainedConfig:
    """The dense model's config, from the directory of a saved gated model.

    Raises:
        GossamerError: if it is missing or damaged.
    """
    file = folder / "base_config.json"
    settings = _read_json(file, folder)
    with reading(file, AGAIN):
        return AutoConfig.for_model(settings.pop("model_type"), **settings)


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a saved gated model by name.

    Raises:
        GossamerError: if a file is missing or truncated.
    """
    index = folder / "gossamer.safetensors.index.json"
    names = ["gossamer.safetensors"]
    if index.exists():
        with reading(index, AGAIN):
            check(found := _read_json(index, folder), _Index)
            names = sorted({Path(name).name for name in found["weight_map"].values()})
    weights: dict[str, torch.Tensor] = {}
    for name in names:
        tensors = read_tensors(folder / name, remedy=AGAIN)
        weights.update({unwrapped_name(key): tensor for key, tensor in tensors.items()})
    return weights


class _Index(TypedDict):
    weight_map: dict[str, str]


def gate_biases(model: PreTrainedModel) -> torch.Tensor:
    """The learned gate biases b, ``[layers, heads]``, detached."""
    return torch.stack([module.get_parameter("gate_bias").detach() for module in attention_modules(model)])


def _read_json(file: Path, folder: Path) -> dict[str, Any]:
    if not file.is_file():
        raise GossamerError(f"{folder} is not a saved gossamer model: no readable {file.name}")
    found: dict[str, Any] = read_json(file, remedy=AGAIN)
    return found


def saved_base(folder: Path) -> str:
    """The name of the dense model that a saved gated model was made from; ``unknown`` if it was not known."""
    return str(_read_json(folder / "config.json", folder).get("base", "unknown"))


def is_saved_model(folder: Path) -> bool:
    """Whether :func:`save` wrote the directory."""
    file = folder / "config.json"
    return file.exists() and _read_json(file, folder).get("model_type") == MODEL_TYPE


def is_run(folder: Path) -> bool:
    """Whether the directory is that of a run, which keeps its models in subdirectories."""
    return (folder / "blocks.safetensors").exists()
