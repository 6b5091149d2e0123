"""Tokenizers of many kinds: prompts without an ending token, and the tokenizer saved with a gated model."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers import models as backends
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import BertProcessing, RobertaProcessing, Sequence, TemplateProcessing
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

import gossamer
from families import tiny_model
from gossamer.errors import GossamerError
from gossamer.models.tokenizers import load_own_tokenizer, prompt_ids, strip_end_tokens

VOCABULARY = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "[UNK]": 3, "the": 4, "model": 5, "reads": 6}
CLS, SEP = ("[CLS]", 1), ("[SEP]", 2)
PROCESSORS = {
    "none": None,
    "start": TemplateProcessing(single="[CLS] $A", special_tokens=[CLS]),
    "end": TemplateProcessing(single="$A [SEP]", special_tokens=[SEP]),
    "both": TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[CLS, SEP]),
    "two ends": Sequence([TemplateProcessing(single="[CLS] $A [SEP] [SEP]", special_tokens=[CLS, SEP])]),
    "bert": BertProcessing(SEP[:2], CLS[:2]),
    "roberta": RobertaProcessing(SEP[:2], CLS[:2]),
}


def tokenizer_of(kind: str, unknown: bool = True) -> PreTrainedTokenizerFast:
    """Create a tokenizer of words that adds special tokens of the given kind."""
    model = backends.WordLevel(VOCABULARY, unk_token="[UNK]") if unknown else backends.BPE(VOCABULARY, [])
    backend = Tokenizer(model)
    backend.pre_tokenizer = Whitespace()
    if PROCESSORS[kind] is not None:
        backend.post_processor = PROCESSORS[kind]
    names = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


@pytest.mark.parametrize("kind", PROCESSORS)
def test_a_prompt_keeps_what_stands_before_it_and_nothing_after_it(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    start = [] if kind in ("none", "end") else [1]
    assert prompt_ids(tokenizer, "the model reads") == [*start, 4, 5, 6]
    assert prompt_ids(tokenizer, "") == start
    # An ending token that the text itself contains is kept.
    assert prompt_ids(tokenizer, "the [SEP]") == [*start, 4, 2]
    assert strip_end_tokens(tokenizer, "the", [4]) == [4]


def test_a_start_token_stays_where_the_tokenizer_knows_no_letter() -> None:
    assert prompt_ids(tokenizer_of("start", unknown=False), "") == [1]


def test_a_tokenizer_without_a_fast_form_ends_no_prompt() -> None:
    assert prompt_ids(ByT5Tokenizer(), "ab") == [ord("a") + 3, ord("b") + 3]
    assert prompt_ids(ByT5Tokenizer(), "") == []


@pytest.mark.parametrize("tokenizer", [ByT5Tokenizer(extra_ids=0), tokenizer_of("both")], ids=["slow", "fast"])
def test_the_tokenizer_saved_along_is_read_back(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    gossamer.save(gossamer.add_gates(tiny_model("llama")), tmp_path / "model", tokenizer)
    found = load_own_tokenizer(tmp_path / "model")
    assert found("the model").input_ids == tokenizer("the model").input_ids
    assert found.is_fast == tokenizer.is_fast


def test_a_tokenizer_that_is_missing_or_damaged_is_named(tmp_path: Path) -> None:
    gossamer.save(gossamer.add_gates(tiny_model("llama")), tmp_path / "model", tokenizer_of("both"))
    file = tmp_path / "model" / "tokenizer.json"
    file.write_text(json.dumps({"model": 1}))
    with pytest.raises(GossamerError, match=r"the tokenizer in .*model cannot be read"):
        load_own_tokenizer(tmp_path / "model")
    file.unlink()
    (tmp_path / "model" / "tokenizer_config.json").unlink()
    with pytest.raises(GossamerError, match=r"model has no tokenizer; save one there: tokenizer\.save_pretrained\('"):
        load_own_tokenizer(tmp_path / "model")
