"""A run that cannot fit into memory is refused before anything is written, with a value that would fit."""

from pathlib import Path

import pytest

from families import tiny_model
from gossamer import GossamerError
from gossamer.runs.job import post_train
from gossamer.runs.memory import machine_memory, require_memory
from gossamer.runs.settings import RunConfig

ASKED = {"model": "m", "text": "t.txt", "seq_len": 16}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tokens": 10**14}, "100,000,000,000,000 tokens take .* give at most --tokens .* or --stream"),
        ({"tokens": 64, "gradient_accumulation": 2**20, "batch_size": 2**14}, "one step of batch_size 16,384 and"),
        ({"tokens": 64, "batch_size": 2**20, "seq_len": 2**14, "stream": True}, "--batch-size 1,048,576 needs"),
        ({"text": "self", "held_out_tokens": 10**14}, "tokens take"),
    ],
)
def test_what_the_machine_cannot_hold_is_named_with_what_would_fit(settings: dict, words: str) -> None:
    config = RunConfig.from_dict({**ASKED, **settings})
    with pytest.raises(GossamerError, match=words):
        require_memory(config, tiny_model("llama"))


def test_what_fits_is_let_through() -> None:
    assert machine_memory() > 2**28
    require_memory(RunConfig.from_dict({**ASKED, "tokens": 10**6}), tiny_model("llama"))


def test_nothing_is_left_of_a_run_that_is_refused(saved_llama: Path, text: Path, tmp_path: Path) -> None:
    config = RunConfig.from_dict({**ASKED, "model": str(saved_llama), "text": str(text), "tokens": 10**14})
    with pytest.raises(GossamerError, match="this machine has"):
        post_train(config, tmp_path / "run")
    assert not list(tmp_path.iterdir())
