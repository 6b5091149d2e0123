"""Low-rank adapters (LoRA, arXiv 2106.09685) on the linear maps of a model's layers, through peft.

All other weights are frozen, so a gated model with adapters still contains the dense model it was made from; see
:func:`as_dense`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from gossamer.errors import GossamerError
from gossamer.models.architectures import architecture_of
from gossamer.models.attention import gate_state

if TYPE_CHECKING:
    from peft import LoraConfig
    from peft.tuners.tuners_utils import BaseTunerLayer


def has_adapters(model: PreTrainedModel) -> bool:
    """Whether the model has adapters."""
    return hasattr(model, "peft_config")


def adapter_targets(model: PreTrainedModel, names: Sequence[str] = ()) -> tuple[str, ...]:
    """The linear maps to put adapters on, as suffixes of their paths within a layer.

    Args:
        model: of a supported family, without adapters.
        names: suffixes such as ``q_proj`` or ``mlp.up_proj``; each selects all maps whose path within a layer ends with
            it. If empty, the attention projections of the family.

    Raises:
        GossamerError: naming the first of ``names`` that matches no linear map in any layer, and the available maps.
    """
    architecture = architecture_of(model)
    if not names:
        # Include the attention module's name: GPT-2's MLP also has a map called c_proj.
        return tuple(f"{architecture.attention}.{projection}" for projection in architecture.projections)
    paths = _linear_maps(model)
    for name in names:
        if not any(f".{path}".endswith(f".{name}") for path in paths):
            raise GossamerError(
                f"no layer of this {model.config.model_type} model has a linear map {name!r} to put an adapter on; "
                f"there are {', '.join(paths)}"
            )
    return tuple(dict.fromkeys(names))


def _linear_maps(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The linear maps in the layers by their path within a layer; one module per path."""
    return {
        path: module
        for layer in model.get_submodule(architecture_of(model).layers)
        for path, module in layer.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
    }


def add_adapters(
    model: PreTrainedModel, *, rank: int, alpha: float, targets: Sequence[str] = (), seed: int = 0
) -> None:
    """Put trainable adapters on linear maps of all layers, in place; freeze all other weights except the gates.

    The adapters start as the zero map: the second of their two factors is 0.

    Args:
        model: dense or gated, without adapters.
        rank: of the product of the two factors.
        alpha: the product is scaled by alpha / rank.
        targets: which maps, as for :func:`adapter_targets`.
        seed: for the initialisation of the first factors.

    Raises:
        GossamerError: if peft is not installed, if the model has adapters already, or if a target is in no layer.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise GossamerError("training with lora needs the package peft: pip install 'gossamer[lora]'") from error
    if has_adapters(model):
        raise GossamerError("this model has adapters already; gossamer.merge_adapters(model) adds them to its weights")
    config = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=model.name_or_path or None,
        r=rank,
        lora_alpha=alpha,
        target_modules=list(adapter_targets(model, targets)),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in _linear_maps(model).values()),
    )
    with torch.random.fork_rng(devices=[]):  # peft creates adapters on the CPU, wherever the model is
        torch.default_generator.manual_seed(seed)
        inject_adapters(model, config)


def inject_adapters(model: PreTrainedModel, config: "LoraConfig") -> None:
    """Put the adapters of a peft configuration on a model, in place; adapters and gates are trainable."""
    from peft import inject_adapter_in_model

    inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or name.endswith("gate_bias"))


def merge_adapters(model: PreTrainedModel) -> None:
    """Merge the adapters into the weights and remove them, in place.

    Raises:
        GossamerError: if the model has no adapters.
    """
    if not has_adapters(model):
        raise GossamerError("this model has no adapters to merge")
    for name, module in _adapted(model).items():
        module.merge()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module.get_base_layer())
    del model.peft_config


def _adapted(model: PreTrainedModel) -> "dict[str, BaseTunerLayer]":
    """The modules with adapters, by name."""
    if not has_adapters(model):
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


@contextmanager
def as_dense(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Disable the gates and adapters of a gated model and put it into ``eval()`` mode; restore all on exit.

    If only adapters and gates were trained, the model inside the context is bit-for-bit the dense model it was made
    from: attention uses the dense model's implementation. Nothing is copied.

    Yields:
        The model.

    Raises:
        GossamerError: if the model has no gates.
    """
    state = gate_state(model)
    was_switched_off = state.switched_off
    implementation = model.config._attn_implementation
    adapted = _adapted(model).values()
    off = [module.disable_adapters for module in adapted]
    modes = [(module, module.training) for module in model.modules()]
    # peft sets requires_grad when it turns adapters off and on.
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval()
        for module in adapted:
            module.enable_adapters(False)
        state.switched_off = True
        model.set_attn_implementation(state.dense_implementation)
        yield model
    finally:
        state.switched_off = was_switched_off
        model.set_attn_implementation(implementation)
        for module, was_off in zip(adapted, off, strict=True):
            module.enable_adapters(not was_off)
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
        for each, training in modes:
            each.training = training
