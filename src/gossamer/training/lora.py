"""Low-rank adapters on the attention projections (LoRA, arXiv 2106.09685), through peft."""

from transformers import PreTrainedModel

from gossamer.errors import GossamerError
from gossamer.models.architectures import architecture_of


def add_adapters(model: PreTrainedModel, *, rank: int, alpha: float) -> None:
    """Put trainable adapters on all attention projections, in place; every other weight is frozen.

    Raises:
        GossamerError: if peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise GossamerError("training with lora needs the package peft: pip install 'gossamer[lora]'") from error
    targets = list(architecture_of(model).projections)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets), model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)


def merge_adapters(model: PreTrainedModel) -> None:
    """Add the adapters into the weights they sit on and take them off, in place."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())
