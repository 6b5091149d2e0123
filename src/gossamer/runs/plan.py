"""Estimates of a run's memory and time before it starts; nothing is measured.

The model is built without weights (torch's fake tensors). One forward pass shows which tensors autograd would keep for
the backward pass; each is counted with its actual shape and dtype, for any family. The rest follows from parameter
counts. Memory is summed per device at the four moments of a step that can be its peak:

    loss       after the forward pass, when the gradient of the logits is computed
    backward   at the start of the backward pass, with the gradient of the unembedding
    last layer at the end of the backward pass, with all gradients
    update     in AdamW

``benchmarks/plan.py`` compares the estimates with measured steps.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from gossamer.errors import GossamerError
from gossamer.measures.losses import POSITIONS
from gossamer.models.architectures import architecture_of, attention_modules
from gossamer.models.lora import add_adapters
from gossamer.ops.chunked import BLOCK
from gossamer.runs.settings import RunConfig
from gossamer.training.trainer import freeze_except

_FAKE_ATTENTION = "gossamer-plan"

RESERVE = 1.5 * 2**30
"""Bytes of a GPU reserved for the CUDA context and for memory lost in the allocator; assumed, not measured."""

MARGIN = 1.2
"""Allocated memory as a multiple of the estimated live memory; an assumption, see benchmarks/README.md."""

UTILISATION = 0.3
"""Assumed fraction of a device's peak FLOP/s that a step achieves."""


Device = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Plan:
    """Estimated memory and computation of a run.

    Attributes:
        parameters: number of parameters of the dense model.
        trained: number of trained parameters, including those of adapters.
        moments: for each moment of a step, the bytes on one device by what they hold.
        flops_per_token: floating-point operations per training token, without validation and the control.
        control_flops_per_token: the same for the dense control.
    """

    parameters: int
    trained: int
    moments: dict[str, dict[str, int]]
    flops_per_token: float
    control_flops_per_token: float

    @property
    def peak(self) -> int:
        """Peak bytes on one device over all moments."""
        return max(sum(terms.values()) for terms in self.moments.values())

    def tokens_per_second(self, gpus: int, tflops: float, utilisation: float = UTILISATION) -> float:
        """Estimate training tokens per second over all devices; ``tflops`` is the peak of one, in 10^12 FLOP/s."""
        return gpus * tflops * 1e12 * utilisation / self.flops_per_token


@dataclass(frozen=True)
class _Kept:
    """Bytes that autograd keeps: in total, per layer and for a layer's input; and the bytes of one logit."""

    total: int
    layer: int
    layer_input: int
    logits_itemsize: int


def plan_run(model: dict[str, Any], run: RunConfig, device: Device = "cuda") -> Plan:
    """Estimate a run on a model with the given configuration.

    Args:
        model: ``model_type`` and the fields of transformers' configuration class.
        run: the settings; each of the ``processes`` holds a copy of the model and has its own batch.
        device: the device type; the attention op and AdamW need different memory on each.

    Raises:
        GossamerError: if the family is not supported or is a mixture of experts, or if the model's context is shorter
            than ``seq_len``.
    """
    given = dict(model)
    family = given.pop("model_type", "unknown")
    if family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise GossamerError(f"{family} is not a causal language model; gossamer gates decoders only")
    config = AutoConfig.for_model(family, **given)
    context = getattr(config, "max_position_embeddings", run.seq_len)
    if run.seq_len > context:
        raise GossamerError(f"--seq-len {run.seq_len} is over the model's context of {context} tokens")
    fake, parameters = _fake_model(config, run)
    with FakeTensorMode(allow_non_fake_inputs=True):
        _make_fake(fake)
        kept = _kept(fake, run)
    return Plan(
        parameters=parameters,
        trained=_count(fake, trained=True),
        moments=_moments(fake, kept, run, parameters, device),
        flops_per_token=_flops(fake, run, dense=run.training.constraint.needs_dense),
        control_flops_per_token=_flops(fake, run, dense=False),
    )


def alternatives(model: dict[str, Any], run: RunConfig, room: float) -> list[tuple[dict[str, Any], RunConfig, int]]:
    """Change settings one after another until a step, with its margin, fits into ``room`` bytes.

    Every step keeps its number of blocks. The last alternative fits, unless none does.

    Returns:
        For each number of changes: the changed settings, the complete configuration, and the peak in bytes.
    """
    found: list[tuple[dict[str, Any], RunConfig, int]] = []
    blocks = run.training.batch_size * run.training.gradient_accumulation
    changes: tuple[dict[str, Any], ...] = (
        {"batch_size": 1, "gradient_accumulation": blocks},
        {"gradient_checkpointing": True},
        {"train": "attention"},
        {"train": "lora"},
        {"seq_len": max(2, run.seq_len // 2)},
    )
    order = {"all": 0, "attention": 1, "lora": 2}
    together: dict[str, Any] = {}
    for values in changes:
        changed = RunConfig.from_dict({**run.to_dict(), **values})
        if changed == run or order[changed.training.train] < order[run.training.train]:
            continue
        run = changed
        together |= values
        peak = plan_run(model, run).peak
        found.append((dict(together), run, peak))
        if MARGIN * peak <= room:
            break
    return found


def _fake_model(config: Any, run: RunConfig) -> tuple[PreTrainedModel, int]:
    AttentionInterface.register(_FAKE_ATTENTION, _fake_attention)
    AttentionMaskInterface.register(_FAKE_ATTENTION, _no_mask)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        architecture_of(model)
        if any("Experts" in type(module).__name__ for module in model.modules()):
            raise GossamerError(
                f"{config.model_type} is a mixture of experts; which of them a token meets is not known beforehand, so "
                "there is no estimate: measure a short run"
            )
        model.config._attn_implementation = _FAKE_ATTENTION
        parameters = _count(model, trained=False)
        if run.training.train == "lora":
            add_adapters(model, rank=run.lora_rank, alpha=1.0, targets=run.lora_targets)
        else:
            freeze_except(model, run.training.train)
    return model.eval(), parameters


def _make_fake(model: nn.Module) -> None:
    """Replace meta tensors, on which autocast does nothing, by fake CPU tensors. Tied parameters stay tied."""
    made: dict[Tensor, Tensor] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if parameter not in made:
                    made[parameter] = nn.Parameter(torch.empty_like(parameter, device="cpu"), parameter.requires_grad)
                module._parameters[name] = made[parameter]  # type: ignore[assignment]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")


class _FakeGatedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, heads, tokens, _ = q.shape
        output = q.new_empty(batch, tokens, heads, v.shape[-1]).transpose(1, 2)
        normaliser = q.new_empty(batch, heads, tokens, dtype=torch.float32)
        ctx.save_for_backward(q, k, v, output, normaliser)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise NotImplementedError


def _fake_attention(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    return _FakeGatedAttention.apply(q, k, v).transpose(1, 2), None


def _no_mask(*_: Any, **__: Any) -> None:
    return None


def _count(model: nn.Module, *, trained: bool) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained)


@contextmanager
def _counted(storages: dict[int, Tensor], own: set[int]) -> Iterator[None]:
    """Within the block, add every storage that autograd keeps to ``storages``, except those in ``own``."""

    def keep(tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage()._cdata
        if key not in own:
            storages[key] = tensor  # the reference prevents reuse of the key
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield


def _kept(model: PreTrainedModel, run: RunConfig) -> _Kept:
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    storages: dict[int, Tensor] = {}
    marks: list[int] = []
    inputs: list[int] = []

    def total() -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())

    def before(module: nn.Module, given: tuple[Any, ...]) -> None:
        marks.append(total())
        inputs.append(given[0].numel() * given[0].element_size())

    layers = model.get_submodule(architecture_of(model).layers)
    handles = [layer.register_forward_pre_hook(before) for layer in layers]
    handles.append(layers[-1].register_forward_hook(lambda *_: marks.append(total())))
    ids = torch.zeros(run.training.batch_size, run.seq_len, dtype=torch.long)
    with torch.autocast("cpu", torch.bfloat16, enabled=run.training.precision != "fp32"), _counted(storages, own):
        logits = model(input_ids=ids, use_cache=False).logits
    for handle in handles:
        handle.remove()
    layer = (marks[-1] - marks[0]) // len(layers)
    return _Kept(total(), layer, inputs[0], logits.element_size())


def _moments(
    model: PreTrainedModel, kept: _Kept, run: RunConfig, parameters: int, device: Device
) -> dict[str, dict[str, int]]:
    config = model.config
    layers, vocabulary = config.num_hidden_layers, config.vocab_size
    everything, trained = _count(model, trained=False), _count(model, trained=True)
    unembedding = model.get_output_embeddings().weight
    embedding = 4 * unembedding.numel() if unembedding.requires_grad else 0
    largest = max((p.numel() for p in model.parameters() if p.requires_grad), default=0)
    training, tokens = run.training, run.training.batch_size * run.seq_len
    logits = tokens * vocabulary
    rows = min(POSITIONS, tokens)
    dense = training.constraint.needs_dense
    half = 4 if training.precision == "fp32" else 2
    # Trainer converts the logits of its model to float32; with adapters, that model also computes the dense logits.
    dense_logits = 4 if training.train == "lora" else half

    gradients = 4 * trained
    always = {
        "weights (float32)": 4 * everything,
        "AdamW states": 8 * trained,
        "gradient buckets of several GPUs": gradients if training.processes > 1 else 0,
        "dense reference": half * parameters if dense and training.train != "lora" else 0,
    }
    activations = kept.total
    working = kept.layer
    if training.gradient_checkpointing:
        activations = kept.total - layers * kept.layer + layers * kept.layer_input
        working = 2 * kept.layer
    # Backward pass of one layer's attention: about four buffers of queries x keys; the Triton kernels need none.
    blocks = 0
    if device == "cpu":
        heads = config.num_attention_heads
        blocks = 4 * 4 * training.batch_size * heads * min(BLOCK, run.seq_len) * run.seq_len
    accumulated = gradients if training.gradient_accumulation > 1 else 0
    # Trainer converts the logits to float32; the loss keeps them and allocates a gradient of the same size.
    loss = {
        "activations": activations,
        "gradients": accumulated,
        "logits and their gradient": 8 * logits + (dense_logits * logits if dense else 0),
        "float32 rows of the loss": (4 if dense else 2) * 4 * rows * vocabulary,
    }
    backward = {
        "activations": activations,
        "gradients": max(accumulated, embedding) + (embedding if accumulated else embedding // 2),
        "logits and their gradient": (4 + half) * logits,
    }
    last = {"activations": kept.layer, "gradients": gradients + embedding, "one layer's backward": working + blocks}
    backward["one layer's backward"] = working + blocks
    update = {
        "gradients": gradients,
        "temporaries of AdamW": 4 * trained if device == "cuda" else 8 * largest,
    }
    return {
        name: {**always, **terms}
        for name, terms in {"loss": loss, "backward": backward, "last layer": last, "update": update}.items()
    }


def _flops(model: PreTrainedModel, run: RunConfig, *, dense: bool) -> float:
    """Count FLOPs per token: two per weight in each matrix product, plus attention over the causal pairs."""
    weights = trained = 0
    for module in model.modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            weights += module.weight.numel()
            trained += module.weight.numel() if module.weight.requires_grad else 0
    output = architecture_of(model).projections[-1]
    outputs = [cast(Tensor, module.get_submodule(output).weight) for module in attention_modules(model)]
    product = sum(weight.numel() for weight in outputs) // model.config.hidden_size * (run.seq_len + 1)
    forward = 2 * weights + 2 * product
    backward = 2 * weights + 2 * trained + 5 * product
    again = forward if run.training.gradient_checkpointing else 0
    reference = 2 * weights + 2 * product if dense else 0
    return float(forward + backward + again + reference)
