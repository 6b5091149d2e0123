"""How much memory and time a run will take, before it is begun. Estimates, not measurements.

The model is built without weights (torch's fake tensors), and one forward pass tells what autograd would keep for the
backward pass: everything that is kept is counted as it is, in its own dtype, for any family. The rest follows from
parameter counts. Memory is summed at the four moments of a step that can be its peak, per device:

    loss       after the forward pass, when the gradient of the logits is made
    backward   at the start of the way back, with the gradient of the unembedding
    last layer at its end, with all gradients
    update     in AdamW

``benchmarks/plan.py`` sets the estimate beside what steps take.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from gossamer.errors import GossamerError
from gossamer.measures.losses import POSITIONS
from gossamer.models.architectures import ARCHITECTURES
from gossamer.models.lora import add_adapters
from gossamer.ops.chunked import BLOCK
from gossamer.training.constraints import Constraint, CrossEntropy
from gossamer.training.trainer import TrainedPart, choose_trained

_FAKE_ATTENTION = "gossamer-plan"

RESERVE = 1.5 * 2**30
"""Bytes of a GPU left to the CUDA context and to what the allocator cannot use; assumed, not measured."""

MARGIN = 1.2
"""What an allocator may take, as a multiple of the estimate of what is alive; assumed: see benchmarks/README.md."""

UTILISATION = 0.3
"""Share of a device's peak arithmetic that a step is assumed to use."""


@dataclass(frozen=True)
class StepShape:
    """What decides the cost of a training step.

    Attributes:
        seq_len: tokens in a block.
        batch_size: blocks in one forward pass of one device.
        gradient_accumulation: forward passes in one step.
        train: which weights move.
        lora_rank: of the adapters, when those are trained.
        lora_targets: the linear maps that they go on; all of the attention if there are none.
        constraint: some run the dense model too: a copy, but where adapters are trained.
        precision: of the matrix products.
        gradient_checkpointing: keep only what goes into each layer, and compute the rest a second time.
        gpus: processes with a copy of the model each; their batches add up.
        device: ``cpu`` or ``cuda``: they differ in the op and in AdamW.
    """

    seq_len: int = 256
    batch_size: int = 4
    gradient_accumulation: int = 1
    train: TrainedPart = "all"
    lora_rank: int = 16
    lora_targets: tuple[str, ...] = ()
    constraint: Constraint = field(default_factory=CrossEntropy)
    precision: Literal["fp32", "bf16"] = "bf16"
    gradient_checkpointing: bool = False
    gpus: int = 1
    device: Literal["cpu", "cuda"] = "cuda"

    @property
    def tokens(self) -> int:
        """Of one forward pass on one device."""
        return self.batch_size * self.seq_len


@dataclass(frozen=True)
class Plan:
    """What a run is estimated to take.

    Attributes:
        parameters: of the dense model.
        trained: parameters that move, those of adapters included.
        moments: for each moment of a step, bytes by name of what lies on a device.
        flops_per_token: floating-point operations of a training token, validation and control not counted.
        control_flops_per_token: those of the dense control.
    """

    parameters: int
    trained: int
    moments: dict[str, dict[str, int]]
    flops_per_token: float
    control_flops_per_token: float

    @property
    def peak(self) -> int:
        """Bytes on a device at the worst moment."""
        return max(sum(terms.values()) for terms in self.moments.values())

    def tokens_per_second(self, gpus: int, tflops: float, utilisation: float = UTILISATION) -> float:
        """Training tokens a second, over all devices, of devices with that peak arithmetic (10^12 a second)."""
        return gpus * tflops * 1e12 * utilisation / self.flops_per_token


@dataclass(frozen=True)
class _Kept:
    """Bytes that autograd keeps: in all, in one layer, and of what goes into one layer."""

    total: int
    layer: int
    layer_input: int
    logits_itemsize: int


def plan_run(config: dict[str, Any], shape: StepShape) -> Plan:
    """Estimate a run on a model of that configuration.

    Args:
        config: ``model_type`` and the fields of transformers' configuration class.
        shape: of a step.

    Raises:
        GossamerError: if the family is not supported, or the context is shorter than ``seq_len``.
    """
    fields = dict(config)
    family = fields.pop("model_type", "unknown")
    if family not in ARCHITECTURES:
        raise GossamerError(f"{family} is not a supported family; supported families: {', '.join(ARCHITECTURES)}")
    settings = AutoConfig.for_model(family, **fields)
    context = settings.max_position_embeddings
    if shape.seq_len > context:
        raise GossamerError(f"--seq-len {shape.seq_len} is over the model's context of {context} tokens")
    model, parameters = _fake_model(settings, shape)
    with FakeTensorMode(allow_non_fake_inputs=True):
        _make_fake(model)
        kept = _kept(model, shape)
    return Plan(
        parameters=parameters,
        trained=_count(model, trained=True),
        moments=_moments(model, kept, shape, parameters),
        flops_per_token=_flops(model, shape),
        control_flops_per_token=_flops(model, replace(shape, constraint=CrossEntropy())),
    )


def alternatives(config: dict[str, Any], shape: StepShape, room: float) -> list[tuple[str, StepShape, int]]:
    """Changes, one more each time, until a step fits into ``room`` bytes with its margin: flags, shape, peak.

    The batch of a step stays the same; the last one fits, unless nothing does.
    """
    found: list[tuple[str, StepShape, int]] = []
    step = shape.batch_size * shape.gradient_accumulation
    half = max(2, shape.seq_len // 2)
    changes: list[tuple[dict[str, str], dict[str, Any]]] = [
        (
            {"--batch-size": "1", "--gradient-accumulation": str(step)},
            {"batch_size": 1, "gradient_accumulation": step},
        ),
        ({"--gradient-checkpointing": ""}, {"gradient_checkpointing": True}),
        ({"--train": "attention"}, {"train": "attention"}),
        ({"--train": "lora"}, {"train": "lora"}),
        ({"--seq-len": str(half)}, {"seq_len": half}),
    ]
    order = {"all": 0, "attention": 1, "lora": 2}
    flags: dict[str, str] = {}
    for words, values in changes:
        changed = replace(shape, **values)
        if changed == shape or order[changed.train] < order[shape.train]:
            continue
        shape = changed
        flags |= words
        peak = plan_run(config, shape).peak
        found.append((" ".join(f"{flag} {value}".strip() for flag, value in flags.items()), shape, peak))
        if MARGIN * peak <= room:
            break
    return found


def _fake_model(settings: Any, shape: StepShape) -> tuple[PreTrainedModel, int]:
    AttentionInterface.register(_FAKE_ATTENTION, _fake_attention)
    AttentionMaskInterface.register(_FAKE_ATTENTION, _no_mask)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings, attn_implementation=_FAKE_ATTENTION)
        parameters = _count(model, trained=False)
        if shape.train == "lora":
            add_adapters(model, rank=shape.lora_rank, alpha=1.0, targets=shape.lora_targets)
        else:
            choose_trained(model, shape.train)
    return model.eval(), parameters


def _make_fake(model: nn.Module) -> None:
    """Fake tensors of a real device in place of those of ``meta``, where autocast does nothing. Tied ones stay tied."""
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


class _KeepsWhatTheOpKeeps(torch.autograd.Function):
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
    return _KeepsWhatTheOpKeeps.apply(q, k, v).transpose(1, 2), None


def _no_mask(*_: Any, **__: Any) -> None:
    return None


def _count(model: nn.Module, *, trained: bool) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained)


@contextmanager
def _counted(storages: dict[int, Tensor], own: set[int]) -> Iterator[None]:
    """Within it, every storage that autograd keeps is put into ``storages``, but for ``own``."""

    def keep(tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage()._cdata
        if key not in own:
            storages[key] = tensor  # holding it keeps the key from being used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield


def _kept(model: PreTrainedModel, shape: StepShape) -> _Kept:
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    storages: dict[int, Tensor] = {}
    marks: list[int] = []
    inputs: list[int] = []

    def total() -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())

    def before(module: nn.Module, given: tuple[Any, ...]) -> None:
        marks.append(total())
        inputs.append(given[0].numel() * given[0].element_size())

    layers = model.get_submodule(ARCHITECTURES[model.config.model_type].layers)
    handles = [layer.register_forward_pre_hook(before) for layer in layers]
    handles.append(layers[-1].register_forward_hook(lambda *_: marks.append(total())))
    ids = torch.zeros(shape.batch_size, shape.seq_len, dtype=torch.long)
    with torch.autocast("cpu", torch.bfloat16, enabled=shape.precision == "bf16"), _counted(storages, own):
        logits = model(input_ids=ids, use_cache=False).logits
    for handle in handles:
        handle.remove()
    layer = (marks[-1] - marks[0]) // len(layers)
    return _Kept(total(), layer, inputs[0], logits.element_size())


def _moments(model: PreTrainedModel, kept: _Kept, shape: StepShape, parameters: int) -> dict[str, dict[str, int]]:
    config = model.config
    layers, vocabulary = config.num_hidden_layers, config.vocab_size
    everything, trained = _count(model, trained=False), _count(model, trained=True)
    unembedding = model.get_output_embeddings().weight
    embedding = 4 * unembedding.numel() if unembedding.requires_grad else 0
    largest = max((p.numel() for p in model.parameters() if p.requires_grad), default=0)
    logits = shape.tokens * vocabulary
    rows = min(POSITIONS, shape.tokens)
    dense = shape.constraint.needs_dense
    half = 2 if shape.precision == "bf16" else 4
    # Trainer makes float32 of the logits of its own model, which with adapters is the dense one as well.
    dense_logits = 4 if shape.train == "lora" else half

    gradients = 4 * trained
    always = {
        "weights (float32)": 4 * everything,
        "AdamW states": 8 * trained,
        "gradient buckets of several GPUs": gradients if shape.gpus > 1 else 0,
        "dense reference": half * parameters if dense and shape.train != "lora" else 0,
    }
    activations = kept.total
    working = kept.layer
    if shape.gradient_checkpointing:
        activations = kept.total - layers * kept.layer + layers * kept.layer_input
        working = 2 * kept.layer
    # Of one layer's attention in backward: some four buffers of queries x keys; the Triton kernels have none.
    blocks = 0
    if shape.device == "cpu":
        heads = config.num_attention_heads
        blocks = 4 * 4 * shape.batch_size * heads * min(BLOCK, shape.seq_len) * shape.seq_len
    accumulated = gradients if shape.gradient_accumulation > 1 else 0
    # Trainer makes float32 of the logits; the loss keeps them and makes a gradient of their size.
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
        "temporaries of AdamW": 4 * trained if shape.device == "cuda" else 8 * largest,
    }
    return {
        name: {**always, **terms}
        for name, terms in {"loss": loss, "backward": backward, "last layer": last, "update": update}.items()
    }


def _flops(model: PreTrainedModel, shape: StepShape) -> float:
    """Of one token: two a weight and product, and the products of attention over the causal pairs."""
    weights = trained = 0
    for module in model.modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            weights += module.weight.numel()
            trained += module.weight.numel() if module.weight.requires_grad else 0
    config = model.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    product = config.num_hidden_layers * config.num_attention_heads * size * (shape.seq_len + 1)
    forward = 2 * weights + 2 * product
    backward = 2 * weights + 2 * trained + 5 * product
    again = forward if shape.gradient_checkpointing else 0
    reference = 2 * weights + 2 * product if shape.constraint.needs_dense else 0
    return float(forward + backward + again + reference)
