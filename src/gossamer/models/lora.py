"""Low-rank adapters (LoRA, arXiv 2106.09685) on the linear maps of a model's layers, through peft.

All other weights stay as they were, so a gated model with adapters still holds the dense model it was made from:
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
    """Whether adapters sit on the model's weights."""
    return hasattr(model, "peft_config")


def adapter_targets(model: PreTrainedModel, names: Sequence[str] = ()) -> tuple[str, ...]:
    """The linear maps that adapters go on, by the end of their path within a layer.

    Args:
        model: of a supported family, without adapters.
        names: such ends, ``q_proj`` or ``mlp.up_proj``; each stands for all maps whose path in a layer ends so. The
            attention projections of the family if there are none.

    Raises:
        GossamerError: naming the first of ``names`` that is no linear map in any layer, and those there are.
    """
    architecture = architecture_of(model)
    if not names:
        # With the attention's own name: GPT-2 calls a map of its MLP c_proj too.
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
    """The linear maps in the layers by their path within one, each once."""
    return {
        path: module
        for layer in model.get_submodule(architecture_of(model).layers)
        for path, module in layer.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
    }


def add_adapters(
    model: PreTrainedModel, *, rank: int, alpha: float, targets: Sequence[str] = (), seed: int = 0
) -> None:
    """Put trainable adapters on linear maps of all layers, in place; every other weight but the gates' is frozen.

    They change nothing at first: the second of their two factors is 0.

    Args:
        model: dense or gated, without adapters.
        rank: of the product of the two factors.
        alpha: the product counts alpha / rank times.
        targets: which maps, as for :func:`adapter_targets`.
        seed: of the first factors.

    Raises:
        GossamerError: if peft is not installed, or a target is in no layer.
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
    with torch.random.fork_rng(devices=[]):  # peft makes adapters on the CPU, wherever the model is
        torch.default_generator.manual_seed(seed)
        inject_adapters(model, config)


def inject_adapters(model: PreTrainedModel, config: "LoraConfig") -> None:
    """Put the adapters that peft's configuration describes on a model, in place, trainable beside the gates."""
    from peft import inject_adapter_in_model

    inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or name.endswith("gate_bias"))


def merge_adapters(model: PreTrainedModel) -> None:
    """Add the adapters into the weights they sit on and take them off, in place.

    Raises:
        GossamerError: if the model has none.
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
    """Within it, a gated model is without gates and adapters and in ``eval()`` mode; afterwards as it was.

    What it computes there is, bit for bit, what the dense model computes that it was made from, as long as only
    adapters and gates were trained: attention goes through the implementation that the dense model had. Nothing is
    copied.

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
