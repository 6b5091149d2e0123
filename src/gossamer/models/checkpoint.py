"""Save and load gated models, and find dense ones by name.

A saved model is a directory:

    config.json             model_type "gossamer", so that no plain transformers class takes it for a dense one
    base_config.json        the dense model's own config
    gossamer*.safetensors   all weights and the gate biases
    tokenizer files, generation_config.json, README.md (the model card)

Plain ``AutoModelForCausalLM.from_pretrained`` stops at the unknown model type, and a model class called by
name stops because there is no ``model.safetensors``.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from gossamer.errors import GossamerError
from gossamer.files import written_beside
from gossamer.models.architectures import attention_modules
from gossamer.models.convert import is_gated, sparsify
from gossamer.models.lora import has_adapters

FORMAT = 1
"""Version of the directory's layout."""

_CARD = """---
library_name: gossamer
base_model: {base}
---

# A sparse-attention model made with gossamer

A {family} model with hard on/off gates on its attention links. The weights were trained under these gates
and mean nothing without them. Plain transformers refuses this directory: the model type `gossamer` is
unknown to it and there is no `model.safetensors`. The one line that loads it:

    model = gossamer.load("path/to/this/directory")

`gossamer.densify(model)` takes the gates off, which leaves a model with a much higher loss.
"""


def save(
    model: PreTrainedModel, path: str | os.PathLike[str], tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Write a gated model to a directory that :func:`load` reads back to the same logits.

    Args:
        model: a gated model.
        path: the directory; one that exists is replaced, whole or not at all.
        tokenizer: saved along if given.

    Raises:
        GossamerError: if the model has no gates or has adapters, or the directory cannot be written.
    """
    if has_adapters(model):
        raise GossamerError(
            "this model has adapters: gossamer.save_adapter(model, path) saves those and the gates alone, "
            "gossamer.merge_adapters(model) adds them to its weights"
        )
    with written_beside(Path(path)) as staging:
        write_model(model, staging, tokenizer)


def write_model(
    model: PreTrainedModel,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    state_dict: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write the files of :func:`save` into an existing folder.

    ``state_dict`` are all weights in full, where the model's own are in parts in several processes.
    """
    if not is_gated(model):
        raise GossamerError("this model has no gates; save a dense model with save_pretrained")
    config = model.config.to_dict()
    base = config.pop("_name_or_path", None) or model.config.name_or_path or "unknown"
    config.pop("quantization_config", None)
    config["architectures"] = [type(model).__name__]
    outer = {"model_type": "gossamer", "format": FORMAT, "base_model_type": model.config.model_type, "base": base}
    (folder / "config.json").write_text(json.dumps(outer, indent=2) + "\n")
    (folder / "base_config.json").write_text(json.dumps(config, indent=2, default=str) + "\n")
    (folder / "README.md").write_text(_CARD.format(base=base, family=model.config.model_type))
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    tensors = model.state_dict() if state_dict is None else {n: _own_storage(t) for n, t in state_dict.items()}
    save_torch_state_dict(tensors, folder, filename_pattern="gossamer{suffix}.safetensors")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _own_storage(tensor: torch.Tensor) -> torch.Tensor:
    # What was gathered from several processes may be a view of a padded buffer, which safetensors refuses.
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def load(
    path: str | os.PathLike[str], *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> PreTrainedModel:
    """Load a gated model that :func:`save` wrote, gates and all, in ``eval()`` mode.

    Args:
        path: the directory.
        dtype: of the weights; as saved if None.
        device: where to put them.

    Raises:
        GossamerError: if there is no such directory, or it is not a whole gossamer model.
    """
    folder = Path(path)
    outer = _read_json(folder / "config.json", folder)
    if outer.get("model_type") != "gossamer":
        raise GossamerError(f"{folder} holds a dense {outer.get('model_type')} model, not a gossamer one")
    if outer.get("format") != FORMAT:
        raise GossamerError(f"{folder} has format {outer.get('format')}; this version of gossamer reads {FORMAT}")
    config = base_config(folder)
    weights = read_weights(folder)
    gates = {name: weights.pop(name) for name in list(weights) if name.endswith(".gate_bias")}
    model_class = AutoModelForCausalLM._model_mapping[type(config)]
    model, found = model_class.from_pretrained(
        None, config=config, state_dict=weights, dtype=dtype or config.dtype, output_loading_info=True
    )
    if missing := sorted(found["missing_keys"]):
        raise GossamerError(f"{folder} is not whole: it lacks {', '.join(missing[:3])}")
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.config.name_or_path = outer.get("base", "unknown")
    model = sparsify(model, inplace=True)
    names = {f"{name}.gate_bias" for name, module in model.named_modules() if hasattr(module, "gate_bias")}
    if names != set(gates):
        raise GossamerError(f"{folder} has gates for {len(gates)} layers, not for {len(names)}; it is not whole")
    model.load_state_dict(gates, strict=False)
    return model.to(device).eval()


def base_config(folder: Path) -> PreTrainedConfig:
    """The dense model's own config, as a saved gated model has it.

    Raises:
        GossamerError: if it is missing or damaged.
    """
    settings = _read_json(folder / "base_config.json", folder)
    return AutoConfig.for_model(settings.pop("model_type"), **settings)


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a saved gated model by name.

    Raises:
        GossamerError: if a file is missing or cut short.
    """
    index = folder / "gossamer.safetensors.index.json"
    names = ["gossamer.safetensors"]
    if index.exists():
        names = sorted(set(_read_json(index, folder)["weight_map"].values()))
    weights: dict[str, torch.Tensor] = {}
    for name in names:
        try:
            with safe_open(folder / name, framework="pt") as file:
                weights.update({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise GossamerError(f"{folder / name} is missing or cut short: {error}") from error
    return weights


def gate_biases(model: PreTrainedModel) -> torch.Tensor:
    """The learned gate biases b, ``[layers, heads]``, detached."""
    return torch.stack([module.get_parameter("gate_bias").detach() for module in attention_modules(model)])


def _read_json(file: Path, folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except OSError as error:
        raise GossamerError(f"{folder} is not a saved gossamer model: no readable {file.name}") from error
    except ValueError as error:
        raise GossamerError(f"{file} is not valid JSON: {error}") from error


def is_saved_model(folder: Path) -> bool:
    """Whether the directory is one that :func:`save` wrote."""
    file = folder / "config.json"
    return file.exists() and _read_json(file, folder).get("model_type") == "gossamer"
