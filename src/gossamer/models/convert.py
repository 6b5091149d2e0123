"""Convert a dense model to a gated model and back."""

import copy
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gossamer.errors import GossamerError
from gossamer.models.architectures import PROVEN, architecture_of, attention_modules, check_not_offloaded
from gossamer.models.attention import IMPLEMENTATION, GatePassHook, GateState, LayerPassHook, gate_state
from gossamer.models.proof import GateProof
from gossamer.models.structure import hands_arguments_on


def is_gated(model: PreTrainedModel) -> bool:
    """Whether the model has gates; False within :func:`gossamer.as_dense`."""
    states = (getattr(module, "gate_state", None) for module in model.modules())
    state = next((each for each in states if isinstance(each, GateState)), None)
    return state is not None and not state.switched_off


class SavePretrained:
    """``save_pretrained`` of a gated model: writes the files of :func:`gossamer.save`, and keeps files already there.

    transformers' method would write a directory that silently loads as a dense model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def __call__(
        self, save_directory: str | os.PathLike[str], *, state_dict: dict[str, Tensor] | None = None, **options: Any
    ) -> None:
        """Write the files of :func:`gossamer.save` into a directory.

        Args:
            save_directory: created if it does not exist.
            state_dict: the full weights, if those of the model are sharded over several processes.
            options: of transformers; only those that have no effect here are accepted.

        Raises:
            GossamerError: on other options.
        """
        from gossamer.models.checkpoint import write_model  # imports this module

        if unknown := sorted(name for name, value in options.items() if name not in _IGNORED and value):
            raise GossamerError(f"save_pretrained of a gated model knows no {unknown[0]}; see gossamer.save")
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        write_model(self.model, folder, None, state_dict)


_IGNORED = ("is_main_process", "save_function", "max_shard_size", "safe_serialization")


def _decoder(model: PreTrainedModel) -> nn.Module:
    """The module that runs the layers one after another."""
    return model.get_submodule(architecture_of(model).layers.rpartition(".")[0])


def add_gates(model: PreTrainedModel, *, gate_bias: float = 0.0, inplace: bool = False) -> PreTrainedModel:
    """Make a gated copy of a dense causal language model, with a hard on/off gate on every attention link.

    This only adds the gates; ``gossamer sparsify`` on the command line and :func:`gossamer.runs.job.post_train` also
    train them.

    Args:
        model: of a family in :data:`gossamer.models.architectures.PROVEN`, or of another family with the same module
            names; the latter is run on a few tokens with and without gates, as a check.
        gate_bias: initial b of every head in G = S + b; 0 as in the paper, large values start with open gates.
        inplace: gate the model itself instead of a copy.

    Returns:
        The gated model. Gates are hard in both ``eval()`` and ``train()`` mode, except within
        :func:`gossamer.sampled_gates`.

    Raises:
        GossamerError: for families and settings that cannot be gated correctly; the model is then left without gates.
    """
    if is_gated(model):
        raise GossamerError("this model has gates already; gossamer.remove_gates(model) takes them off")
    architecture_of(model)
    check_not_offloaded(model)
    proof = None if model.config.model_type in PROVEN else GateProof(model)
    if not inplace:
        model = copy.deepcopy(model)
    state = GateState(dense_implementation=model.config._attn_implementation)
    decoder = _decoder(model)
    decoder.gate_hook = decoder.register_forward_pre_hook(GatePassHook(state), with_kwargs=True)  # type: ignore[assignment]
    heads = model.config.num_attention_heads
    layers = model.get_submodule(architecture_of(model).layers)
    for layer, module in enumerate(attention_modules(model)):
        weight = next(module.parameters())
        module.gate_bias = nn.Parameter(torch.full((heads,), float(gate_bias), device=weight.device))
        module.gate_state = state  # type: ignore[assignment]
        module.gate_layer = layer  # type: ignore[assignment]
        if not hands_arguments_on(layers[layer]):
            hook = layers[layer].register_forward_pre_hook(LayerPassHook(module), with_kwargs=True)
            module.gate_pass_hook, module.gate_pass = hook, None  # type: ignore[assignment]
    model.save_pretrained = SavePretrained(model)
    model.set_attn_implementation(IMPLEMENTATION)
    if proof is not None:
        try:
            proof.check(model)
        except GossamerError:
            remove_gates(model, inplace=True)
            raise
    return model


def remove_gates(model: PreTrainedModel, *, inplace: bool = False) -> PreTrainedModel:
    """Make a copy of a gated model without its gates: the same weights with ordinary dense attention.

    Raises:
        GossamerError: if the model has no gates.
    """
    if not is_gated(model):
        raise GossamerError("this model has no gates to take off")
    if not inplace:
        model = copy.deepcopy(model)
    implementation = gate_state(model).dense_implementation
    decoder = _decoder(model)
    decoder.gate_hook.remove()  # type: ignore[operator, union-attr]
    del decoder.gate_hook, model.save_pretrained
    for module in attention_modules(model):
        del module.gate_bias, module.gate_state, module.gate_layer
        if hasattr(module, "gate_pass_hook"):
            module.gate_pass_hook.remove()  # type: ignore[operator, union-attr]
            del module.gate_pass_hook, module.gate_pass
    model.set_attn_implementation(implementation)
    return model
