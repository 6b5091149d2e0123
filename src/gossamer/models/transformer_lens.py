"""Install the gates of a gated model in TransformerLens' TransformerBridge.

A bridge has its own implementation of attention, so a gated model that it wraps silently loses its gates. This module
restores them between two hook points of the bridge. The scores S from ``hook_attn_scores``, including edits by other
hooks, decide the gates A = 1[S + b > 0], and the pattern P that enters ``hook_pattern`` becomes A P. Hooks on
``hook_pattern`` and ``run_with_cache`` therefore see A P, the weights that multiply the values. Rows of this pattern
do not sum to 1.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gossamer.errors import GossamerError
from gossamer.models.checkpoint import gate_biases
from gossamer.models.convert import is_gated, remove_gates

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

_TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3}
"""Largest accepted difference of log-probabilities between bridge and model, nats; 0.25 in lower precisions."""


class BridgeGates:
    """Gates installed in a bridge; :meth:`remove`, or the end of a ``with`` block, removes them."""

    def __init__(self, handles: "list[RemovableHandle | _LastHook]") -> None:
        self._handles = handles

    def remove(self) -> None:
        """Remove the gates; the bridge is dense again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> "BridgeGates":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def gated_bridge(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> "TransformerBridge":
    """Build a TransformerBridge of a gated model, including its gates; nothing is downloaded.

    Args:
        model: a gated model; the bridge wraps a copy of its weights.
        tokenizer: must have been loaded from a directory or a hub, because TransformerLens reads it again from there;
            without a tokenizer, the bridge takes only token ids.

    Raises:
        GossamerError: if TransformerLens is not installed, if the tokenizer was not loaded from anywhere, or if the
            bridge does not compute the same as the model.
    """
    try:
        from transformer_lens.model_bridge.sources import build_bridge_from_module
    except ImportError as error:
        raise GossamerError(
            "a bridge needs the package transformer-lens: pip install 'gossamer[transformer-lens]'"
        ) from error
    if not is_gated(model):
        raise GossamerError("this model has no gates; gossamer.add_gates(model) puts them in")
    if tokenizer is not None and not tokenizer.init_kwargs.get("name_or_path"):
        raise GossamerError(
            "TransformerLens reads a tokenizer anew from where it was loaded; save this one and load it with "
            "AutoTokenizer.from_pretrained"
        )
    dense = remove_gates(model)
    dense.set_attn_implementation("eager")
    bridge = build_bridge_from_module(
        dense,
        type(dense).__name__,
        hf_config=dense.config,
        tokenizer=tokenizer,
        model_name=model.config.name_or_path or model.config.model_type,
    )
    gate_bridge(bridge, model)
    return bridge


@torch.no_grad()
def gate_bridge(bridge: "TransformerBridge", model: PreTrainedModel) -> BridgeGates:
    """Install the gates of ``model`` in a bridge that wraps the same weights.

    The gates stay until ``remove()`` is called on the result, or until the end of the ``with`` block if it is used as a
    context manager; ``bridge.reset_hooks()`` leaves them in place. A few tokens are run through both models, now and
    when the bridge first runs in compatibility mode, to check that they agree.

    Args:
        bridge: booted from ``gossamer.remove_gates(model)``, or from a dense model with the same weights. Compatibility
            mode works, except for ``fold_value_biases``, which assumes that rows of the pattern sum to 1.
        model: the gated model; grouped-query attention is supported.

    Raises:
        GossamerError: if the model has no gates; if the gated bridge does not compute the same as the model, because of
            other weights, folded value biases, or a family whose attention TransformerLens leaves to transformers.
    """
    if not is_gated(model):
        raise GossamerError("this model has no gates; gossamer.add_gates(model) puts them in")
    biases = gate_biases(model)
    layers = len(bridge.blocks)
    if layers != len(biases):
        raise GossamerError(f"the bridge has {layers} layers, the gated model {len(biases)}")
    handles: list[RemovableHandle | _LastHook] = []
    for layer, bias in enumerate(biases):
        attention = bridge.blocks[layer].attn
        layer_gates = _LayerGates(bias[:, None, None])
        handles.append(_LastHook(attention.hook_attn_scores, layer_gates.read))
        handles.append(attention.hook_pattern.register_forward_hook(layer_gates.close, prepend=True))
    handles.append(bridge.register_forward_pre_hook(_Check(model), prepend=True))
    gates = BridgeGates(handles)
    try:
        bridge(torch.zeros(1, 1, dtype=torch.long, device=bridge.cfg.device), return_type="logits")
    except BaseException:
        gates.remove()
        raise
    return gates


class _LayerGates:
    """The gates of one layer between its two hook points."""

    def __init__(self, bias: Tensor) -> None:
        self.bias = bias
        self.opened: Tensor | None = None

    def read(self, module: nn.Module, inputs: Any, scores: Tensor) -> None:
        """Compute the gates from the scores, [batch, heads, queries, keys]."""
        self.opened = scores + self.bias.to(scores.device) > 0

    def close(self, module: nn.Module, inputs: Any, pattern: Tensor) -> Tensor:
        """Zero the closed links in the pattern, of the same shape."""
        opened, self.opened = self.opened, None
        if opened is None or opened.shape != pattern.shape:
            raise GossamerError("TransformerLens gave no attention scores before this pattern; it cannot be gated")
        return pattern * opened


class _LastHook:
    """A forward hook that runs after all others, even later ones: it re-registers itself before each forward pass."""

    def __init__(self, module: nn.Module, hook: Any) -> None:
        self.module, self.hook = module, hook
        self.before = module.register_forward_pre_hook(self._renew)
        self.last = module.register_forward_hook(hook)

    def _renew(self, module: nn.Module, inputs: Any) -> None:
        self.last.remove()
        self.last = module.register_forward_hook(self.hook)

    def remove(self) -> None:
        self.before.remove()
        self.last.remove()


class _Check:
    """Check that bridge and model agree, before the bridge's first run and its first run in compatibility mode.

    Compatibility mode changes the bridge in place and may fold the value biases.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        parameter = next(model.parameters())
        self.family = model.config.model_type
        self.tolerance = _TOLERANCE.get(parameter.dtype, 0.25)
        self.ids = (torch.arange(16, device=parameter.device)[None] + 3) * 7919 % model.config.vocab_size
        logits = model(input_ids=self.ids, use_cache=False).logits
        self.wanted = logits.float().log_softmax(-1)
        self.checked: set[bool] = set()

    @torch.no_grad()
    def __call__(self, bridge: nn.Module, inputs: Any) -> None:
        mode = bool(bridge.compatibility_mode)
        if mode in self.checked:
            return
        self.checked.add(mode)  # the check runs the bridge itself
        found = bridge(self.ids.to(bridge.cfg.device), return_type="logits").float().log_softmax(-1)
        difference = float((found.to(self.wanted.device) - self.wanted).abs().max())
        if not difference <= self.tolerance:
            self.checked.discard(mode)
            raise GossamerError(
                f"the bridge with gates and the gated model differ by {difference:.2g} nat in a log-probability: the "
                "bridge has other weights, or value biases folded by compatibility mode (pass "
                f"fold_value_biases=False), or TransformerLens leaves the attention of {self.family} to transformers"
            )
