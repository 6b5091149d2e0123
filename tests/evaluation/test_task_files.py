"""Users' task files run no code unless it is allowed explicitly."""

from pathlib import Path

import pytest

from families import tiny_model
from gossamer.errors import GossamerError
from gossamer.evaluation.capability import TasksConfig, check_tasks, measure_tasks
from gossamer.evaluation.task_files import check_task_files, templates_without_code
from tiny_task import TINY_TASK

pytest.importorskip("lm_eval")


def write(folder: Path, text: str) -> Path:
    (folder / "tiny.yaml").write_text(text)
    (folder / "tiny.jsonl").write_text('{"prompt": "the", "choices": ["one", "two"], "answer": 0}\n')
    (folder / "evil.py").write_text("from pathlib import Path\nPath('harmed').touch()\ndef f(docs):\n    return docs\n")
    return folder


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (TINY_TASK + "process_docs: !function evil.f\n", r"line 11: the task brings !function evil.f"),
        (TINY_TASK + "class: Task\n", "line 11: the task brings class"),
        (TINY_TASK + "include: ../other.yaml\n", "another file from outside"),
        (TINY_TASK.replace("metric: acc", "metric: ./evil.py"), "a metric that the harness does not have itself"),
        (TINY_TASK.replace("metric: acc", "metric: acc, hf_evaluate: true"), "hf_evaluate"),
        ("a: &a [*a]\nb: !!python/object/apply:os.system [x]\n", "is not YAML|brings"),
        ("task: [\n", "is not YAML"),
    ],
)
def test_a_task_that_brings_code_is_refused_before_it_is_read(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(GossamerError, match=said):
        check_task_files(write(tmp_path, text))


def test_a_task_without_code_is_let_through(tmp_path: Path) -> None:
    check_task_files(write(tmp_path, TINY_TASK))


def test_code_is_run_only_where_it_is_asked_for(tokenizer, tmp_path: Path) -> None:
    folder = tmp_path / "tasks"
    folder.mkdir()
    write(folder, TINY_TASK + "process_docs: !function evil.f\n")
    with pytest.raises(GossamerError, match="give --allow-task-code"):
        check_tasks(tokenizer, TasksConfig(["tiny"], folder))
    assert not list(tmp_path.rglob("harmed"))
    check_tasks(tokenizer, TasksConfig(["tiny"], folder, allow_task_code=True))
    assert list(tmp_path.rglob("harmed"))


def test_templates_call_nothing_that_leads_out(tokenizer, tmp_path: Path) -> None:
    escape = "{{ ''.__class__.__mro__[1].__subclasses__() | length }}"
    folder = write(tmp_path, TINY_TASK.replace("{{prompt}}", escape))
    with pytest.raises(Exception, match="unsafe"):
        measure_tasks(tiny_model("llama"), tokenizer, TasksConfig(["tiny"], folder))
    from lm_eval import utils

    outside = utils.env
    with templates_without_code():
        assert utils.apply_template("{{a | upper}}", {"a": "x"}) == "X"
    assert utils.env is outside
