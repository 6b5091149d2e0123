"""Capabilities of models on tasks of lm-eval-harness: the sparse model beside the dense model and the dense control.

The harness pads multiple-choice requests on the right, and generates from left-padded prompts with a cache. Gated
attention has no links to padding, so a request's result does not depend on the rest of its batch.
"""

import copy
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gossamer.errors import GossamerError
from gossamer.evaluation.task_files import check_task_files, templates_without_code
from gossamer.files import atomic_write_text
from gossamer.inputs import reading
from gossamer.models.tokenizers import load_own_tokenizer, strip_end_tokens
from gossamer.models.vocabulary import require_vocabulary
from gossamer.runs.record import Run, load_control, load_sparse
from gossamer.training.tokens import end_of_text


@dataclass(frozen=True)
class TasksConfig:
    """Tasks of lm-eval-harness, and how they are measured.

    Attributes:
        tasks: names of tasks, groups or tags of the harness, or of tasks in ``task_path``.
        task_path: a directory with custom tasks as YAML files in the harness's format; ``data_files`` in them are
            relative to that directory.
        allow_task_code: whether custom tasks may run code: see :mod:`gossamer.evaluation.task_files`.
        shots: examples before each question; None: the task's default.
        limit: maximum number of examples of each task; None: all.
        batch_size: requests per forward pass.
        precision: ``bf16`` runs matrix products under autocast.
        seed: seed of the choice of shots.
    """

    tasks: Sequence[str]
    task_path: Path | None = None
    allow_task_code: bool = False
    shots: int | None = None
    limit: int | None = None
    batch_size: int = 8
    precision: str = "fp32"
    seed: int = 0


def measure_tasks(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: TasksConfig
) -> dict[str, dict[str, Any]]:
    """Evaluate one model on tasks of lm-eval-harness.

    Args:
        model: dense or gated, with hard gates.
        tokenizer: the model's tokenizer.
        config: the tasks and how to measure them.

    Returns:
        For each task: ``version``, ``shots``, ``examples``, and ``metrics``, which has for each metric ``value``,
        ``stderr`` (None if the harness has none) and ``higher_is_better``.

    Raises:
        GossamerError: if lm-eval is not installed; if a task is unknown or cannot be loaded; if the tokenizer has no
            token that begins or ends a text, or has tokens that the model does not know.
    """
    require_vocabulary(model, tokenizer, "a task")
    manager, loaded = _load(config)
    from lm_eval import evaluator

    evaluator.get_git_commit_hash = lambda: None  # outside a repository, git prints a line that begins with "fatal:"
    reader = _reader(
        tokenizer,
        pretrained=model,
        batch_size=config.batch_size,
        mixed_precision_dtype=torch.bfloat16 if config.precision == "bf16" else None,
    )
    with _guarded(config), reading(f"the task {', '.join(config.tasks)}"):
        found = evaluator.simple_evaluate(
            reader,
            tasks=loaded,
            task_manager=manager,  # else the harness reads all its tasks again
            num_fewshot=config.shots,
            limit=config.limit,
            log_samples=False,
            random_seed=config.seed,
            numpy_random_seed=config.seed,
            torch_random_seed=config.seed,
            fewshot_random_seed=config.seed,
        )
    return {name: _metrics(name, found) for name in found["results"]}


def compare_on_tasks(
    models: Mapping[str, Callable[[], PreTrainedModel]],
    tokenizer: PreTrainedTokenizerBase,
    config: TasksConfig,
    *,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, dict[str, Any]]:
    """Evaluate several models on the same tasks.

    Args:
        models: what loads each model, by its name in the result: ``dense``, ``sparse`` and, if there is one,
            ``control``.
        tokenizer: the tokenizer of all models.
        config: the tasks and how to measure them.
        progress: called with a short description of the current step.

    Returns:
        The entry ``tasks`` of ``metrics.json``, documented in ``docs/metrics.md``.

    Raises:
        GossamerError: as :func:`measure_tasks` does.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, load in models.items():
        progress(f"tasks: {name}")
        for task, result in measure_tasks(load(), tokenizer, config).items():
            facts = {key: result[key] for key in ("version", "shots", "examples")}
            facts |= {"harness": f"lm-eval {version('lm-eval')}", "precision": config.precision}
            record = found.setdefault(task, {**facts, "models": {}})
            record["models"][name] = result["metrics"]
    return found


def add_tasks(run: Run, config: TasksConfig, *, progress: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Measure tasks with every model of a finished, evaluated run and add them to its ``metrics.json``.

    Args:
        run: the run.
        config: the tasks and how to measure them.
        progress: called with a short description of the current step.

    Returns:
        The contents of ``metrics.json``.

    Raises:
        GossamerError: as :func:`measure_tasks` does, before any model is loaded.
    """
    metrics: dict[str, Any] = run.read_metrics()
    found = compare_on_tasks(_models(run), load_own_tokenizer(run.model), config, progress=progress)
    metrics["tasks"] = {**metrics.get("tasks", {}), **found}
    atomic_write_text(run.metrics, json.dumps(metrics, indent=2) + "\n")
    return metrics


def check_tasks(tokenizer: PreTrainedTokenizerBase, config: TasksConfig) -> None:
    """Check that the tasks and the tokenizer can be used, before any long computation.

    Raises:
        GossamerError: naming the task, or what the tokenizer lacks.
    """
    _load(config)
    _ending_of(tokenizer)


def _ending_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """Token that the harness uses as the end of a text, and as the start of a text without context."""
    end = end_of_text(tokenizer)
    if not end:
        raise GossamerError(
            "lm-eval-harness needs a token that begins or ends a text, and this tokenizer has none: name one that the "
            "model knows, tokenizer.eos_token = ..., and save the tokenizer with the model"
        )
    return end[0]


def _reader(tokenizer: PreTrainedTokenizerBase, **options: Any) -> Any:
    """Wrap a model for the harness, with a copy of the tokenizer because the harness changes it."""
    from lm_eval.models.huggingface import HFLM

    end = _ending_of(tokenizer)
    own = copy.deepcopy(tokenizer)
    if own.pad_token_id is None:
        own.pad_token = own.convert_ids_to_tokens(end)  # else the harness may add a token that the model has no row for

    class Reader(HFLM):
        """Drops the token that the tokenizer appends to a text; the scored continuation would follow it."""

        @property
        def eot_token_id(self) -> int:
            return end

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **more: Any
        ) -> list[int]:
            ids = strip_end_tokens(own, string, super().tok_encode(string, add_special_tokens, **more))
            return ids[-left_truncate_len:] if left_truncate_len else ids

        def tok_batch_encode(
            self,
            strings: list[str],
            padding_side: str = "left",
            left_truncate_len: int | None = None,
            truncation: bool = False,
        ) -> tuple[torch.Tensor, torch.Tensor]:
            rows = [self.tok_encode(string, left_truncate_len=left_truncate_len) for string in strings]
            batch = own.pad({"input_ids": rows}, padding_side=padding_side, return_tensors="pt", verbose=False)
            return batch["input_ids"], batch["attention_mask"]

    start = own.bos_token_id if own.bos_token_id is not None else end
    return Reader(tokenizer=own, prefix_token_id=start, **options)


def _models(run: Run) -> dict[str, Callable[[], PreTrainedModel]]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models: dict[str, Callable[[], PreTrainedModel]] = {
        "dense": lambda: run.load_dense(device)[0],
        "sparse": lambda: load_sparse(run),
    }
    if run.control.exists():
        models["control"] = lambda: load_control(run)
    return models


def _load(config: TasksConfig) -> tuple[Any, list[Any]]:
    """Return the harness's task manager, and its task and group objects in the given order."""
    task_path = config.task_path
    manager = _manager(config)
    known = set(manager.all_tasks)
    for name in config.tasks:
        if name not in known:
            where = "" if task_path is None else f" and {task_path}"
            raise GossamerError(f"no task {name!r} in lm-eval-harness{where}; lm-eval ls tasks names those it has")
    objects: list[Any] = []
    with _within(task_path), _guarded(config):
        for name in config.tasks:
            try:
                loaded = manager.load([name])
            # A task can be third-party YAML, code and data, so any exception is reported as the task's error.
            except Exception as error:
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise GossamerError(f"the task {name!r} cannot be loaded: {reason}") from error
            objects += [loaded["groups"][name]] if name in loaded["groups"] else loaded["tasks"].values()
    return manager, objects


def _manager(config: TasksConfig) -> Any:
    task_path = config.task_path
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise GossamerError("--tasks needs the package lm-eval: pip install 'gossamer[lm-eval]'") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if task_path is None:
        return _all_tasks(None)
    if not task_path.is_dir():
        raise GossamerError(f"--task-path {task_path} is not a directory with tasks in YAML files")
    if not config.allow_task_code:
        check_task_files(task_path)
    own = TaskManager(include_path=task_path.resolve(), include_defaults=False)
    return own if set(config.tasks) <= set(own.all_tasks) else _all_tasks(task_path.resolve())


@cache
def _all_tasks(task_path: Path | None) -> Any:
    """Task manager that includes the harness's tasks; it reads some 15,000 files, which takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=task_path)


def _guarded(config: TasksConfig) -> AbstractContextManager[None]:
    return nullcontext() if config.task_path is None or config.allow_task_code else templates_without_code()


@contextmanager
def _within(folder: Path | None) -> Iterator[None]:
    before = Path.cwd()
    if folder is not None:
        os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _metrics(task: str, found: dict[str, Any]) -> dict[str, Any]:
    """Extract one task from the harness's results, with metrics named ``acc,none`` and ``acc_stderr,none``."""
    own = found["results"][task]
    better = found["higher_is_better"].get(task, {})
    metrics = {}
    for key, value in own.items():
        name, _, rule = key.partition(",")
        if not rule or name.endswith("_stderr"):
            continue
        stderr = own.get(f"{name}_stderr,{rule}")
        metrics[name if rule == "none" else f"{name} ({rule})"] = {
            "value": float(value),
            "stderr": float(stderr) if isinstance(stderr, (int, float)) else None,
            "higher_is_better": better.get(name) is not False,
        }
    return {
        "version": found["versions"].get(task),
        "shots": found["n-shot"].get(task),
        "examples": found["n-samples"].get(task, {}).get("effective"),
        "metrics": metrics,
    }
