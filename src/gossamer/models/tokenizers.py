"""Load tokenizers of gated and dense models, and tokenize prompts."""

import os
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from gossamer.errors import GossamerError
from gossamer.models.checkpoint import base_config, is_saved_model
from gossamer.models.lora_files import adapter_base, is_adapter
from gossamer.models.pretrained import dense_tokenizer
from gossamer.models.repositories import gossamer_folder
from gossamer.models.shipped import SHIPPED, shipped_adapter

_SOMETHING = ("a", "0", ".")
"""Texts of which every tokenizer can encode at least one."""


def load_tokenizer(path: str | os.PathLike[str], *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model, fast or slow.

    Args:
        path: any model name or path that :func:`gossamer.load`, :func:`gossamer.load_adapter` or
            :func:`gossamer.models.pretrained.load_dense` accepts.
        revision: branch, tag or commit on the Hub; the main branch if None.

    Raises:
        GossamerError: if no tokenizer can be loaded.
    """
    name = os.fspath(path)
    if name in SHIPPED and not os.path.exists(name):
        folder = shipped_adapter(name)
    else:
        folder = gossamer_folder(name, revision) or Path(name)
    if is_adapter(folder):
        return dense_tokenizer(adapter_base(folder))
    return load_own_tokenizer(folder) if is_saved_model(folder) else dense_tokenizer(name)


def load_own_tokenizer(path: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """Load the tokenizer in a directory that :func:`gossamer.save` wrote, fast or slow.

    Raises:
        GossamerError: if the directory has no tokenizer, or it is damaged.
    """
    folder = Path(path)
    files = [name for name in ("tokenizer.json", "tokenizer_config.json") if (folder / name).exists()]
    if not files:
        raise GossamerError(f"{folder} has no tokenizer; save one there: tokenizer.save_pretrained({str(folder)!r})")
    try:
        if "tokenizer.json" in files:
            return PreTrainedTokenizerFast.from_pretrained(folder)
        # The dense model's config selects the class: transformers does not know the model type "gossamer".
        return AutoTokenizer.from_pretrained(folder, config=base_config(folder))
    except Exception as error:  # the tokenizers library raises plain Exception
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise GossamerError(f"the tokenizer in {folder} cannot be read: {reason}") from error


def prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a prompt, without special tokens such as ``[SEP]`` or ``</s>`` at the end.

    Special tokens that the tokenizer puts before a text, such as a start token, are kept.
    """
    return strip_end_tokens(tokenizer, text, tokenizer(text, verbose=False)["input_ids"])


def strip_end_tokens(tokenizer: PreTrainedTokenizerBase, text: str, ids: Sequence[int]) -> list[int]:
    """The token ids ``ids`` of a text without the special tokens that the tokenizer appended, if any."""
    for known in (text, *_SOMETHING):
        plain = tokenizer(known, add_special_tokens=False, verbose=False)["input_ids"]
        if plain:
            break
    if known == text and list(ids) == plain:
        return list(ids)
    whole = tokenizer(known, verbose=False)["input_ids"]
    for after in range(len(whole) - len(plain) + 1):
        if whole[len(whole) - after - len(plain) : len(whole) - after] == plain:
            return list(ids[: len(ids) - after])
    return list(ids)
