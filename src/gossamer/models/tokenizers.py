"""Tokenizers of models: the one that was saved along with a gated model, and prompts in tokens."""

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
"""Texts of which every tokenizer knows one."""


def load_tokenizer(path: str | os.PathLike[str], *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, fast or not.

    Args:
        path: whatever :func:`gossamer.load`, :func:`gossamer.load_adapter` or
            :func:`gossamer.models.pretrained.load_dense` takes.
        revision: branch, tag or commit on the Hub; the main branch if None.

    Raises:
        GossamerError: if there is none.
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
    """The tokenizer in a directory that :func:`gossamer.save` wrote, fast or not.

    Raises:
        GossamerError: if there is none, or it is damaged.
    """
    folder = Path(path)
    files = [name for name in ("tokenizer.json", "tokenizer_config.json") if (folder / name).exists()]
    if not files:
        raise GossamerError(f"{folder} has no tokenizer; save one there: tokenizer.save_pretrained({str(folder)!r})")
    try:
        if "tokenizer.json" in files:
            return PreTrainedTokenizerFast.from_pretrained(folder)
        # The class follows from the dense model's config: "gossamer" is no model type that transformers knows.
        return AutoTokenizer.from_pretrained(folder, config=base_config(folder))
    except Exception as error:  # the tokenizers library raises plain Exception
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise GossamerError(f"the tokenizer in {folder} cannot be read: {reason}") from error


def prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a text that is to be continued: no ``[SEP]`` or ``</s>`` stands after it.

    What the tokenizer puts in front of a text, a start token say, stays.
    """
    return strip_end_tokens(tokenizer, text, tokenizer(text, verbose=False)["input_ids"])


def strip_end_tokens(tokenizer: PreTrainedTokenizerBase, text: str, ids: Sequence[int]) -> list[int]:
    """The tokens ``ids`` of a text less those that the tokenizer put after it; the same if it put none around it."""
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
