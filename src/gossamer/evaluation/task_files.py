"""Check task files for lm-eval-harness for code.

The harness can run Python from a task's YAML: functions (``!function``), classes, metrics that it does not have and
loads from elsewhere, and calls in templates. All files in a task directory are checked for these before the harness
reads them, and templates are rendered in a sandbox.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from gossamer.errors import GossamerError
from gossamer.inputs import read_text, reason

FLAG = "--allow-task-code"

_LONGEST = 1_000_000
"""Maximum number of characters in a task file; the harness's files have a hundredth of that."""


def check_task_files(folder: Path) -> None:
    """Check that no task in a directory contains code.

    Raises:
        GossamerError: if one does; names the file, the line and the code.
    """
    for file in sorted(folder.rglob("*.y*ml")):
        text = read_text(file)
        if len(text) > _LONGEST:
            raise GossamerError(f"{file} has {len(text):,} characters; a task has at most {_LONGEST:,}")
        try:
            node = yaml.compose(text, yaml.SafeLoader)
        except Exception as error:  # invalid YAML fails in many ways
            raise GossamerError(f"{file} is not YAML: {reason(error)}") from error
        if node is not None:
            for line, what in _code_in(node, file.parent, folder):
                raise GossamerError(
                    f"{file}, line {line}: the task brings {what}, which may run any code; read it, and if you trust "
                    f"it, give {FLAG}"
                )


def _code_in(node: Any, here: Path, folder: Path, seen: tuple[int, ...] = ()) -> Iterator[tuple[int, str]]:
    """Yield each line that can run code, with a description of what it contains."""
    if id(node) in seen:  # an alias inside the node it refers to
        return
    seen = (*seen, id(node))
    line = node.start_mark.line + 1
    if node.tag not in yaml.SafeLoader.yaml_constructors:
        yield line, f"{node.tag} {node.value if isinstance(node.value, str) else ''}".strip()
    elif isinstance(node, yaml.SequenceNode):
        for child in node.value:
            yield from _code_in(child, here, folder, seen)
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield from _code_under(str(key.value), value, here, folder)
            yield from _code_in(value, here, folder, seen)


def _code_under(key: str, value: Any, here: Path, folder: Path) -> Iterator[tuple[int, str]]:
    texts = value.value if isinstance(value, yaml.SequenceNode) else [value]
    for each in texts:
        text, line = each.value, each.start_mark.line + 1
        if key == "include" and not (here / str(text)).resolve().is_relative_to(folder.resolve()):
            yield line, f"another file from outside ({text})"
        if key == "metric" and text not in _own_metrics():
            yield line, f"a metric that the harness does not have itself ({text})"
        if (key, text) == ("hf_evaluate", "true") or key in ("class", "trust_remote_code", "unsafe_code"):
            yield line, key


def _own_metrics() -> set[str]:
    import lm_eval.api.metrics  # noqa: F401
    from lm_eval.api.registry import metric_registry

    return set(metric_registry)


@contextmanager
def templates_without_code() -> Iterator[None]:
    """Context manager in which the harness renders templates in a sandbox, where they can only use the example."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from lm_eval import utils

    before = utils.env
    sandbox = ImmutableSandboxedEnvironment(
        loader=before.loader, undefined=before.undefined, keep_trailing_newline=before.keep_trailing_newline
    )
    sandbox.filters.update(before.filters)
    utils.env = sandbox
    try:
        yield
    finally:
        utils.env = before
