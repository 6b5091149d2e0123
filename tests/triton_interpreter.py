"""Triton's interpreter without two computations that nobody needs; together they take two thirds of its time."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from triton.runtime import interpreter


class PatchedOnce:
    """Replaces the interpreter's ``_patch_lang``, which patches all of ``triton.language`` in each call of a function.

    Once for each kernel and module is enough. Kernels restore the language when they end, functions do not.
    """

    def __init__(self, patch: Callable[[Any], Any]) -> None:
        self.patch = patch
        self.scope: Any = None
        self.modules: set[int] = set()

    def __call__(self, function: Any) -> "PatchedOnce":
        module = id(function.__globals__)
        if module not in self.modules:
            scope = self.patch(function)
            self.modules.add(module)
            self.scope = scope if self.scope is None else self.scope
        return self

    def restore(self) -> None:
        scope, self.scope = self.scope, None
        self.modules.clear()
        scope.restore()


def make_faster() -> None:
    """Patch the language once for each kernel, and compute no overflow checks whose results are dropped.

    The interpreter computes them for every sum and product of integers, and asserts them only if ``debug`` is set.
    """
    restorable = hasattr(interpreter, "_LangPatchScope")
    if restorable and not isinstance(interpreter._patch_lang, PatchedOnce):
        interpreter._patch_lang = PatchedOnce(interpreter._patch_lang)
    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    builder.options = replace(builder.options, sanitize_overflow=False)
