"""Tasks of lm-eval-harness on gated models, compared with counts made without batches, padding or a cache."""

import copy
import importlib.util
import json
import random
from functools import partial
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import gossamer
from conftest import WORDS
from families import tiny_model
from gossamer import GossamerError
from gossamer.evaluation import capability
from gossamer.evaluation.capability import TasksConfig, check_tasks, measure_tasks
from tiny_task import TINY_TASK

pytestmark = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")

QUESTIONS, CHOICES, NEW_TOKENS = 12, 3, 4

CHOICE_TASK = TINY_TASK.replace("task: tiny", "task: tiny_choice").replace("tiny.jsonl", "choice.jsonl")
CHOICE_TASK += "metadata: {version: 1.0}\n"

GENERATION_TASK = """
task: tiny_generation
dataset_path: json
dataset_kwargs: {data_files: {test: generation.jsonl}}
output_type: generate_until
test_split: test
doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["never said"], max_gen_toks: 4, do_sample: false}
metric_list: [{metric: exact_match}]
"""


def words(chance: random.Random, least: int, most: int) -> str:
    return " ".join(chance.choices(WORDS, k=chance.randint(least, most)))


def likelihood(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, context: str, more: str) -> float:
    start = tokenizer(context).input_ids
    ids = tokenizer(context + more).input_ids
    log_probabilities = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
    return sum(float(log_probabilities[i - 1, ids[i]]) for i in range(len(start), len(ids)))


def greedy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompt: str) -> str:
    ids = tokenizer(prompt).input_ids
    length = len(ids)
    for _ in range(NEW_TOKENS):
        ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return tokenizer.decode(ids[length:], skip_special_tokens=True)


@pytest.fixture(scope="module")
def models() -> dict[str, PreTrainedModel]:
    dense = tiny_model("llama")
    sparse = gossamer.add_gates(dense, gate_bias=-0.5)
    for model in (dense, sparse):
        model.generation_config.eos_token_id = None  # both then generate the same number of tokens
    return {"dense": dense, "sparse": sparse}


@pytest.fixture(scope="module")
def task_path(tmp_path_factory: pytest.TempPathFactory, models, tokenizer) -> Path:
    """Two tasks. In the second, every other answer is the output of the sparse model for the prompt alone."""
    folder = tmp_path_factory.mktemp("tasks")
    chance = random.Random(0)
    questions = [
        {
            "prompt": words(chance, 2, 9),
            "choices": [words(chance, 1, 3) for _ in range(CHOICES)],
            "answer": chance.randrange(CHOICES),
        }
        for _ in range(QUESTIONS)
    ]
    prompts = [words(chance, 1, 9) for _ in range(QUESTIONS)]
    with torch.no_grad():
        said = [greedy(models["sparse"], tokenizer, prompt) for prompt in prompts]
    rows = [{"prompt": p, "answer": said[i] if i % 2 else "no"} for i, p in enumerate(prompts)]
    for name, task, lines in (("choice", CHOICE_TASK, questions), ("generation", GENERATION_TASK, rows)):
        (folder / f"{name}.yaml").write_text(task)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_accuracy_is_the_count_of_likeliest_answers(kind: str, models, tokenizer, task_path: Path) -> None:
    model = models[kind]
    questions = [json.loads(line) for line in (task_path / "choice.jsonl").read_text().splitlines()]
    right = []
    for question in questions:
        scores = [likelihood(model, tokenizer, question["prompt"], f" {choice}") for choice in question["choices"]]
        right.append(scores.index(max(scores)) == question["answer"])
    share = sum(right) / QUESTIONS
    for batch_size in (1, 8):
        figures = measure_tasks(
            model, tokenizer, TasksConfig(["tiny_choice"], task_path=task_path, batch_size=batch_size)
        )
        metric = figures["tiny_choice"]["metrics"]["acc"]
        assert metric["value"] == pytest.approx(share)
        assert metric["stderr"] == pytest.approx((share * (1 - share) / (QUESTIONS - 1)) ** 0.5)
        assert figures["tiny_choice"]["examples"] == QUESTIONS


def test_the_models_differ_so_that_the_counts_say_something(models, tokenizer, task_path: Path) -> None:
    questions = [json.loads(line) for line in (task_path / "choice.jsonl").read_text().splitlines()]
    with torch.no_grad():
        scores = {
            kind: [likelihood(model, tokenizer, q["prompt"], f" {q['choices'][0]}") for q in questions]
            for kind, model in models.items()
        }
    assert max(abs(a - b) for a, b in zip(scores["dense"], scores["sparse"], strict=True)) > 0.5


def test_generation_with_padding_and_cache_is_that_without(models, tokenizer, task_path: Path) -> None:
    figures = measure_tasks(
        models["sparse"], tokenizer, TasksConfig(["tiny_generation"], task_path=task_path, batch_size=5)
    )
    assert figures["tiny_generation"]["metrics"]["exact_match"]["value"] == pytest.approx(0.5)


def test_an_ending_token_of_the_tokenizer_is_not_between_context_and_answer(models, tokenizer, task_path: Path) -> None:
    """The results equal those of the same tokenizer without an ending token."""
    ending = copy.deepcopy(tokenizer)
    ending.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    assert ending("the model").input_ids == [*tokenizer("the model").input_ids, 2]
    for task in ("tiny_choice", "tiny_generation"):
        plain, ended = (
            measure_tasks(models["sparse"], each, TasksConfig([task], task_path=task_path, batch_size=5))[task][
                "metrics"
            ]
            for each in (tokenizer, ending)
        )
        assert plain == ended
    assert ended["exact_match"]["value"] == pytest.approx(0.5)


def test_tokenizers_without_start_and_end_tokens(models, tokenizer, task_path: Path) -> None:
    """A separator can end texts too; a tokenizer without any such token is refused before anything runs."""
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(GossamerError, match="needs a token that begins or ends a text, and this tokenizer has none"):
        measure_tasks(models["dense"], bare, TasksConfig(["tiny_generation"], task_path=task_path))
    separated = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, sep_token="</s>")
    for task in ("tiny_choice", "tiny_generation"):
        wanted, found = (
            measure_tasks(models["sparse"], each, TasksConfig([task], task_path=task_path, batch_size=5))[task][
                "metrics"
            ]
            for each in (tokenizer, separated)
        )
        assert wanted == found
    assert separated.pad_token is None  # the harness sets a padding token; the given tokenizer is not changed


def test_a_limit_takes_the_first_examples(models, tokenizer, task_path: Path) -> None:
    figures = measure_tasks(models["dense"], tokenizer, TasksConfig(["tiny_choice"], task_path=task_path, limit=5))
    assert figures["tiny_choice"]["examples"] == 5


def test_tasks_that_cannot_be_used_are_named(models, tokenizer, task_path: Path, tmp_path: Path) -> None:
    def measure(name: str, path: Path) -> None:
        measure_tasks(models["dense"], tokenizer, TasksConfig([name], task_path=path))

    with pytest.raises(GossamerError, match="missing is not a directory"):
        measure("tiny_choice", tmp_path / "missing")
    (tmp_path / "choice.yaml").write_text(CHOICE_TASK)
    with pytest.raises(GossamerError, match=r"'tiny_choice' cannot be loaded: .*choice\.jsonl"):
        measure("tiny_choice", tmp_path)


@pytest.mark.parametrize("among_all", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_unknown_task_is_named(
    among_all: bool, models, tokenizer, task_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The harness needs fifteen seconds to read all its own tasks; the quick test lets it read none."""
    from lm_eval.tasks import TaskManager

    if not among_all:
        none = partial(TaskManager, include_defaults=False)
        monkeypatch.setattr(capability, "_all_tasks", lambda path: none(include_path=path))
    config = TasksConfig(["tiny_choice", "other"], task_path=task_path)
    with pytest.raises(GossamerError, match=f"no task 'other' in lm-eval-harness and {task_path};"):
        check_tasks(tokenizer, config)


def test_a_tokenizer_larger_than_the_model_is_refused(tokenizer) -> None:
    """The harness pads with the tokenizer's padding token, for which the model may have no embedding."""
    larger = copy.deepcopy(tokenizer)
    larger.add_tokens([f"<a{number}>" for number in range(20)])
    with pytest.raises(GossamerError, match=r"tokenizer has 98 tokens .*, the model embeddings for 97 only"):
        measure_tasks(tiny_model("llama"), larger, TasksConfig(["arc_easy"]))
