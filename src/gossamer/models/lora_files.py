"""Save and load the LoRA adapters and gates of a gated model, without the dense model's weights.

    adapter_config.json, adapter_model.safetensors   the adapters as peft writes and loads them
    gossamer_gates.safetensors                       the gate biases, and a description of the dense model
    README.md                                        the model card

The description of the dense model is its family, the shapes of all its weights, and :data:`SAMPLES` values of each. So
loading also refuses a model with the same shapes but different weights, for which the adapters were not trained.
"""

import copy
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from gossamer.errors import GossamerError
from gossamer.files import atomic_directory
from gossamer.inputs import check, parse_json, read_json, read_tensors, reading
from gossamer.models.architectures import attention_modules, check_not_offloaded
from gossamer.models.checkpoint import front_matter, gate_biases, is_local_model, is_run, unwrapped
from gossamer.models.convert import add_gates, is_gated
from gossamer.models.lora import has_adapters, inject_adapters, merge_adapters
from gossamer.models.pretrained import cache_folder, load_dense
from gossamer.models.repositories import GATES, found_folder
from gossamer.names import SMOLLM2

if TYPE_CHECKING:
    from peft import LoraConfig

AGAIN = "save the adapters anew with gossamer.save_adapter"

FORMAT = 1
"""Version of ``gossamer_gates.safetensors``."""

SAMPLES = 4
"""Number of evenly spaced values stored for each weight of the dense model."""

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."  # prefix of weight names in peft's files

_CARD = """
# LoRA adapters and attention gates made with gossamer

For a {family} model with hard on/off gates on its attention links. The adapters were trained under these gates:

    model = gossamer.load_adapter("path/to/this/directory", base={base})

Plain peft loads the adapters too, but not the gates; without them the model has a much higher loss.
"""


def save_adapter(model: PreTrainedModel, path: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> None:
    """Write the adapters and gates of a gated model, without the dense weights, for :func:`load_adapter`.

    Args:
        model: gated, with adapters that are not merged.
        path: the directory; an existing one is replaced atomically.
        dtype: of the adapters in the file, for example ``torch.bfloat16`` for half the size; unchanged if None.
            Rounding may open or close gates, so measure the model after loading it.

    Raises:
        GossamerError: if the model has no gates or no adapters, or the directory cannot be written.
    """
    model = unwrapped(model)
    if not is_gated(model):
        raise GossamerError("this model has no gates; peft saves the adapters of a dense model")
    if not has_adapters(model):
        raise GossamerError("this model has no adapters; gossamer.save(model, path) saves it whole")
    from peft import get_peft_model_state_dict

    config = copy.copy(next(iter(model.peft_config.values())))
    config.inference_mode = True
    base = config.base_model_name_or_path or "unknown"
    if base == str(cache_folder() / SMOLLM2):
        base = config.base_model_name_or_path = SMOLLM2
    elif os.path.isdir(base):
        base = config.base_model_name_or_path = os.path.abspath(base)
    # "auto" would query the Hub for the dense model's configuration.
    adapters = get_peft_model_state_dict(model, save_embedding_layers=False)
    weights = _base_weights(model)
    described = {
        "format": FORMAT,
        "base_model_type": model.config.model_type,
        "heads": model.config.num_attention_heads,
        "base_shapes": {name: list(weight.shape) for name, weight in weights.items()},
    }
    with atomic_directory(Path(path), replace=True) as staging:
        config.save_pretrained(str(staging))
        named = {f"{_PREFIX}{name}": value.detach().to("cpu", dtype).contiguous() for name, value in adapters.items()}
        save_file(named, staging / _WEIGHTS, metadata={"format": "pt"})
        gates = {"gate_bias": gate_biases(model).cpu().contiguous(), "base_samples": samples(weights)}
        save_file(gates, staging / GATES, metadata={"gossamer": json.dumps(described)})
        shown = "path/to/the/dense/model" if base == "unknown" or is_local_model(base) else base
        card = _CARD.format(base=json.dumps(shown, ensure_ascii=False), family=model.config.model_type)
        head = front_matter("peft", base, tags=["lora", "gossamer"])
        (staging / "README.md").write_text(head + card, encoding="utf-8")


def is_adapter(folder: Path) -> bool:
    """Whether :func:`save_adapter` wrote the directory."""
    return (folder / GATES).exists()


def adapter_base(path: str | os.PathLike[str]) -> str:
    """The name of the dense model recorded in the adapters' configuration.

    Raises:
        GossamerError: if there are no adapters, or their configuration names no model.
    """
    config, _ = _read_adapters(found_folder(path))
    if not config.base_model_name_or_path:
        raise GossamerError(
            f"{path} does not say which dense model its adapters were trained on; "
            f"gossamer merge {path} --model BASE --out DIR makes a whole model of them"
        )
    return str(config.base_model_name_or_path)


def load_adapter(
    path: str | os.PathLike[str],
    base: PreTrainedModel | str | os.PathLike[str] | None = None,
    *,
    merge: bool = True,
    inplace: bool = False,
    revision: str | None = None,
) -> PreTrainedModel:
    """Load a gated model from the adapters and gates that :func:`save_adapter` wrote, in ``eval()`` mode.

    Args:
        path: the directory, or the id of a repository on the Hub, ``org/name``.
        base: the dense model that the adapters were trained on, or its name or directory as for
            :func:`gossamer.models.pretrained.load_dense`; the one that the adapters name if None.
        merge: merge the adapters into the weights, which gives exactly the model that a run saves; if False, they
            remain adapters and can be trained further.
        inplace: change ``base`` itself instead of a copy, if it is a model.
        revision: branch, tag or commit on the Hub; the main branch if None.

    Raises:
        GossamerError: if the directory or repository does not exist or is incomplete; if the family, shapes or weights
            of ``base`` differ from those of the model that the adapters were trained on.
    """
    folder = found_folder(path, revision)
    described, gates = _read_gates(folder)
    config, adapters = _read_adapters(folder)
    if isinstance(base, PreTrainedModel):
        name = base.name_or_path or "the model given"
        model = base
    else:
        name = adapter_base(folder) if base is None else str(base)
        model, inplace = load_dense(name)[0], True
    check_not_offloaded(model)
    _check_base(model, name, folder, described, gates["base_samples"])
    if len(gates["gate_bias"]) != model.config.num_hidden_layers:
        raise GossamerError(
            f"{folder} has gates for {len(gates['gate_bias'])} layers; {name} has {model.config.num_hidden_layers}"
        )
    model = add_gates(model, inplace=inplace)
    for module, bias in zip(attention_modules(model), gates["gate_bias"], strict=True):
        module.get_parameter("gate_bias").data.copy_(bias)
    _put_on(model, config, adapters, folder)
    if merge:
        merge_adapters(model)
    return model.eval()


def _base_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """The weights of the underlying dense model, by their names there."""
    return {
        name.replace(".base_layer.", "."): parameter
        for name, parameter in model.named_parameters()
        if "lora_" not in name and not name.endswith("gate_bias")
    }


def samples(weights: dict[str, Tensor]) -> Tensor:
    """Evenly spaced values of each weight, first and last included, ``[weights, SAMPLES]``, float32."""
    rows = []
    for weight in weights.values():
        # linspace in float32 can exceed the last index of a large weight.
        places = torch.arange(SAMPLES, device=weight.device) * (weight.numel() - 1) // (SAMPLES - 1)
        rows.append(weight.detach().flatten()[places].float().cpu())
    return torch.stack(rows)


def _check_base(model: PreTrainedModel, name: str, folder: Path, described: dict[str, Any], known: Tensor) -> None:
    if is_gated(model) or has_adapters(model):
        raise GossamerError(f"{name} has gates or adapters already; give the dense model that {folder} was trained on")
    family = described["base_model_type"]
    if model.config.model_type != family:
        raise GossamerError(
            f"{folder} was trained on a {family} model, but {name} is a {model.config.model_type} model"
        )
    if (heads := described["heads"]) != model.config.num_attention_heads:
        raise GossamerError(
            f"{folder} was trained on a model of {heads} heads a layer; {name} has {model.config.num_attention_heads}"
        )
    weights = _base_weights(model)
    shapes = {key: list(weight.shape) for key, weight in weights.items()}
    for key, wanted in described["base_shapes"].items():
        if shapes.get(key) != wanted:
            found = f"of shape {shapes[key]}" if key in shapes else "missing"
            raise GossamerError(
                f"{folder} was trained on a model whose {key} has shape {wanted}; in {name} it is {found}"
            )
    if more := sorted(set(shapes) - set(described["base_shapes"])):
        raise GossamerError(f"{folder} was trained on a model without {more[0]}, which {name} has")
    ordered = {key: weights[key] for key in described["base_shapes"]}
    # Tolerates a base model that was rounded to bfloat16 on one of the two sides.
    same = torch.isclose(samples(ordered), known, rtol=2**-7, atol=1e-6).all(dim=1)
    if not same.all():
        key = list(ordered)[int(same.int().argmin())]
        raise GossamerError(f"{name} is not the model that {folder} was trained on: its {key} has other values")


def _put_on(model: PreTrainedModel, config: "LoraConfig", adapters: dict[str, Tensor], folder: Path) -> None:
    from peft import set_peft_model_state_dict

    config.inference_mode = False
    with reading(f"{folder / _WEIGHTS} with {_CONFIG} beside it", AGAIN):
        inject_adapters(model, config)
        found = set_peft_model_state_dict(model, adapters)
        wrong = [*found.unexpected_keys, *(key for key in found.missing_keys if "lora_" in key)]
        if wrong:
            raise ValueError(f"they do not fit each other at {wrong[0]}")


def _read_gates(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    file = folder / GATES
    if not file.exists():
        hint = f"; {folder} is a run, its adapters are in {folder / 'adapter'}" if is_run(folder) else ""
        raise GossamerError(f"{folder} holds no adapters that gossamer saved: it has no {GATES}{hint}")
    with reading(file, AGAIN):
        with safe_open(file, framework="pt") as stream:
            metadata = stream.metadata() or {}
        described: dict[str, Any] = parse_json(metadata["gossamer"], place=file, remedy=AGAIN)
        if described.get("format") != FORMAT:
            raise GossamerError(f"{file} has format {described.get('format')}; this version of gossamer reads {FORMAT}")
        check(described, _Described)
        shapes = {"gate_bias": (None, described["heads"]), "base_samples": (len(described["base_shapes"]), SAMPLES)}
    return described, read_tensors(file, shapes, remedy=AGAIN)


class _Described(TypedDict):
    """Description of the dense model in the metadata of the gates file."""

    base_model_type: str
    heads: int
    base_shapes: dict[str, list[int]]


class _AdapterConfig(TypedDict):
    """Fields that gossamer requires in peft's configuration."""

    peft_type: str
    r: int
    lora_alpha: float
    target_modules: list[str]
    base_model_name_or_path: str | None


_NAME = re.compile(r"\w+(\.\w+)*")

_SET = (
    "peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "target_modules", "fan_in_fan_out",
    "inference_mode", "peft_version", "revision",
)  # fmt: skip
"""The peft settings that gossamer sets. All others must have peft's defaults: other values would mean other adapters,
and some are regular expressions, whose matching may never end."""


def _check_config(config: dict[str, Any], folder: Path) -> None:
    if (kind := config.get("peft_type")) != "LORA":
        raise GossamerError(f"{folder} holds adapters of the kind {kind}; gossamer trains LORA only")
    check(config, _AdapterConfig)
    if config["r"] < 1:
        raise ValueError(f"r is {config['r']}, not a rank of at least 1")
    for name in config["target_modules"]:
        if _NAME.fullmatch(name) is None:
            raise ValueError(f"target_modules names {name!r}, which is no name of a module")
    from peft import LoraConfig

    defaults = LoraConfig().to_dict()
    for name, value in config.items():
        if name not in _SET and name in defaults and value != defaults[name]:
            raise ValueError(f"it sets {name}, which gossamer does not")


def _read_adapters(folder: Path) -> tuple["LoraConfig", dict[str, Tensor]]:
    try:
        from peft import PeftConfig
    except ImportError as error:
        raise GossamerError("adapters need the package peft: pip install 'gossamer[lora]'") from error
    # peft would look for a missing file on the Hub.
    for name in (_CONFIG, _WEIGHTS):
        if not (folder / name).exists():
            raise GossamerError(f"{folder} is not whole: it has no {name}")
    file = folder / _CONFIG
    with reading(file, AGAIN):
        _check_config(read_json(file, remedy=AGAIN), folder)
        config = PeftConfig.from_pretrained(str(folder))
    return config, read_tensors(folder / _WEIGHTS, remedy=AGAIN)
