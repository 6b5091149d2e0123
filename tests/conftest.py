"""A real tokenizer, real text and a saved tiny model, made once and without a network."""

import gc
import gzip
import json
import os
import random
from pathlib import Path

import pytest
import torch

# Without a GPU, Triton runs its kernels in an interpreter. Set before transformers may import Triton.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from families import tiny_model

WORDS = ("the sparse model reads one two three four tokens and closes every link it does not need in a row").split()  # noqa: SIM905


def pytest_collection_finish() -> None:
    """Keep the garbage collector from visiting the objects of all imported modules, as trainers do at each start."""
    gc.freeze()


def pytest_unconfigure() -> None:
    """Let the interpreter collect them at its end; otherwise some libraries report them as leaked."""
    gc.unfreeze()


def sentences(count: int, seed: int = 0) -> list[str]:
    """Create documents of random words."""
    random_words = random.Random(seed)
    return [" ".join(random_words.choices(WORDS, k=12)) + "." for _ in range(count)]


def write_documents(file: Path) -> Path:
    """Write 400 documents to a .jsonl.gz file."""
    with gzip.open(file, "wt", encoding="utf-8") as stream:
        stream.writelines(json.dumps({"text": sentence}) + "\n" for sentence in sentences(400))
    return file


def save_llama(folder: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Save a tiny dense llama and its tokenizer with transformers."""
    tiny_model("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer with at most the 97 tokens of the tiny models."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    backend.train_from_iterator(sentences(200), trainers.BpeTrainer(vocab_size=97, special_tokens=special))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .jsonl.gz file of documents."""
    return write_documents(tmp_path_factory.mktemp("text") / "text.jsonl.gz")


@pytest.fixture(scope="session")
def saved_llama(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A tiny dense llama with its tokenizer, as transformers saves them."""
    return save_llama(tmp_path_factory.mktemp("model") / "llama", tokenizer)
