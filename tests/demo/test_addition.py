"""Sums as data: every pair once, carries at their natural frequency, and a tokenizer that can be saved."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from gossamer.demo.addition import (
    CHARACTERS,
    POSITIONS,
    PROMPT_TOKENS,
    TOKENS,
    Sums,
    addition_tokenizer,
    illustrative_sums,
    split_pairs,
)


def pairs(sums: Sums) -> set[tuple[int, int]]:
    return set(zip(sums.a.tolist(), sums.b.tolist(), strict=True))


def test_every_pair_is_in_exactly_one_part() -> None:
    split = split_pairs(validation=1_000, held_out=2_000, seed=0)
    assert [len(part) for part in (split.train, split.validation, split.held_out)] == [7_000, 1_000, 2_000]
    together = pairs(split.train) | pairs(split.validation) | pairs(split.held_out)
    assert together == {(a, b) for a in range(100) for b in range(100)}


def test_the_seed_decides_the_split() -> None:
    first, again, other = (split_pairs(validation=100, held_out=200, seed=seed).held_out for seed in (3, 3, 4))
    assert torch.equal(first.a, again.a)
    assert torch.equal(first.b, again.b)
    assert pairs(first) != pairs(other)


def test_carries_are_as_frequent_as_they_naturally_are() -> None:
    split = split_pairs(validation=1_000, held_out=2_000, seed=1)
    everything = Sums(*(torch.cat([getattr(part, name) for part in vars(split).values()]) for name in "ab"))
    assert everything.carry_into_tens.sum() == 4_500
    assert everything.carry_into_hundreds.sum() == 4_950
    for part in vars(split).values():
        # Five standard deviations of a share over about 1,000 pairs.
        assert part.carry_into_tens.double().mean().item() == pytest.approx(0.45, abs=0.08)
        assert part.carry_into_hundreds.double().mean().item() == pytest.approx(0.495, abs=0.08)


def test_texts_and_carries_of_known_sums() -> None:
    sums = Sums(torch.tensor([37, 58, 5, 99, 60]), torch.tensor([58, 67, 3, 1, 50]))
    assert sums.texts() == ["37+58=095", "58+67=125", "05+03=008", "99+01=100", "60+50=110"]
    assert sums.carry_into_tens.tolist() == [True, True, False, True, False]
    assert sums.carry_into_hundreds.tolist() == [False, True, False, True, True]
    assert len(POSITIONS) == TOKENS == len(sums.texts()[0])
    assert sums.texts()[0].index("=") == PROMPT_TOKENS - 1


def test_the_tokenizer_has_one_token_a_character_and_is_saved_with_the_model(tmp_path: Path) -> None:
    addition_tokenizer().save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    sums = split_pairs(validation=1, held_out=50, seed=0).held_out
    for tokenizer in (addition_tokenizer(), loaded):
        assert torch.tensor(tokenizer(sums.texts())["input_ids"]).equal(sums.blocks())
        assert tokenizer.decode(tokenizer("37+58=095")["input_ids"]) == "37+58=095"
        unknown = tokenizer.unk_token_id
        assert tokenizer("1\n x")["input_ids"] == [CHARACTERS.index("1"), unknown, unknown, unknown]


def test_instructive_sums_show_every_way_a_carry_can_go() -> None:
    held_out = split_pairs(validation=1_000, held_out=2_000, seed=0).held_out
    shown = illustrative_sums(held_out)
    assert len(shown) == len({each.text for each in shown}) == 8
    ways = set()
    for each in shown:
        a, b = int(each.text[:2]), int(each.text[3:5])
        assert (a, b) in pairs(held_out)
        ways.add((a % 10 + b % 10 >= 10, a + b >= 100, a // 10 + b // 10 == 9))
    assert ways == {
        (False, False, False),
        (True, False, False),
        (False, True, False),
        (True, True, False),
        (True, True, True),
        (False, False, True),
    }
