"""Tasks by name. To add a task, pass a :class:`Task` to :func:`register`, or use a JSONL file.

def examples(source, tokenizer, corruption):    # endless, random only through source
    while True:
        yield Example("two plus two is", "two plus three is", answers=(" four",), wrong=(" five",))

register(Task("sums", "small sums", "logit_difference", ("other",), examples))
"""

from dataclasses import replace
from pathlib import Path

from gossamer.circuits.ablations import ABLATIONS
from gossamer.circuits.tasks.addition import ADDITION
from gossamer.circuits.tasks.agreement import AGREEMENT
from gossamer.circuits.tasks.base import Batch, DroppedExample, Example, Prompts, Task, TokenizedExample
from gossamer.circuits.tasks.custom import task_from_jsonl
from gossamer.circuits.tasks.docstring import DOCSTRING
from gossamer.circuits.tasks.gendered_pronoun import GENDERED_PRONOUN
from gossamer.circuits.tasks.greater_than import GREATER_THAN
from gossamer.circuits.tasks.induction import INDUCTION
from gossamer.circuits.tasks.ioi import IOI
from gossamer.errors import GossamerError

__all__ = [
    "TASKS",
    "Batch",
    "DroppedExample",
    "Example",
    "Prompts",
    "Task",
    "TokenizedExample",
    "find_task",
    "register",
    "task_from_jsonl",
]

TASKS: dict[str, Task] = {
    task.name: task for task in (IOI, GREATER_THAN, GENDERED_PRONOUN, DOCSTRING, AGREEMENT, INDUCTION, ADDITION)
}


def register(task: Task) -> None:
    """Register a task under its name.

    Raises:
        GossamerError: if the name is taken.
    """
    if task.name in TASKS:
        raise GossamerError(f"there is a task {task.name} already")
    TASKS[task.name] = task


def find_task(name: str) -> Task:
    """Look up a task by name, or load it from a JSONL file.

    A task from a file is named after the file without its extension. The extension stays if the name could otherwise be
    that of another task's record: ``ioi.jsonl``, ``ioi-zero.jsonl``, ``own-mean.jsonl``.

    Raises:
        GossamerError: if there is no such task.
    """
    if name in TASKS:
        return TASKS[name]
    if name.endswith(".jsonl"):
        task = task_from_jsonl(name)
        # Records are called TASK, TASK-CORRUPTION, TASK-ABLATION; some file systems ignore case.
        called = task.name.lower()
        taken = any(f"{called}-".startswith(f"{known.lower()}-") for known in TASKS)
        taken |= called.endswith(tuple(f"-{ablation}" for ablation in ABLATIONS))
        return replace(task, name=Path(name).name) if taken else task
    raise GossamerError(f"there is no task {name!r}; there are {', '.join(TASKS)}, or give a .jsonl file")
