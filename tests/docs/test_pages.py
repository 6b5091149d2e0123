"""The documentation matches the code: commands, options, names and links exist; the slow tests run its code."""

import ast
import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics
from urllib.parse import unquote, urlsplit

import pytest
from typer.main import get_command

import gossamer
from doc_pages import GUIDES, PAGES, ROOT, anchors, blocks, gossamer_lines, inline_code, links
from gossamer.cli import app

COMMANDS = get_command(app).commands
OPTIONS = {
    name
    for command in COMMANDS.values()
    for option in command.params
    for name in (*option.opts, *option.secondary_opts)
}
OPTIONS |= {"--help", "--no-deps", "--config_file", "--num_processes", "--nproc_per_node", "--logdir"}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", GUIDES, ids=name_of)
def test_every_block_is_run_or_says_why_not(page: Path) -> None:
    for block in blocks(page):
        assert block.language in ("bash", "bibtex", "json", "python", "text"), f"{page}:{block.line}"
        assert block.not_run is None or block.language in ("bash", "python"), f"{page}:{block.line}"
        if block.language == "json":
            json.loads(block.text)


@pytest.mark.parametrize("page", GUIDES, ids=name_of)
def test_commands_have_the_arguments_they_are_given(page: Path) -> None:
    for block in blocks(page):
        for name, *arguments in gossamer_lines(block.text) if block.language == "bash" else ():
            COMMANDS[name].make_context(name, list(arguments)).close()
    for code in inline_code(page):
        words = code.split()
        if words[:1] == ["gossamer"] and len(words) > 1:
            assert words[1] in COMMANDS or words[1].isupper(), f"{page}: {code}"
        for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", code):
            assert option in OPTIONS, f"{page}: {code}"


@pytest.mark.parametrize("page", GUIDES, ids=name_of)
def test_names_that_code_imports_are_there(page: Path) -> None:
    for block in blocks(page):
        if block.language == "python":
            tree = ast.parse(block.text)
            imports = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
            exec(compile(ast.Module(imports, []), str(page), "exec"), {})
            for name in re.findall(r"\bgossamer\.([a-z_]+)\(", block.text):
                assert name in gossamer.__all__, f"{page}:{block.line}: gossamer.{name}"


def test_every_public_name_is_in_the_reference() -> None:
    text = "".join(page.read_text() for page in (ROOT / "docs" / "reference" / "python").glob("*.md"))
    listed = set(re.findall(r"^\.\. auto(?:function|class|exception):: gossamer\.(\w+)$", text, re.MULTILINE))
    assert listed == set(gossamer.__all__)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        parts = urlsplit(link)
        if parts.scheme or link.startswith(("{", "#cell")):
            continue
        target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
        assert target.exists(), f"{page}: {link}"
        if parts.fragment and target.suffix == ".md":
            assert unquote(parts.fragment) in anchors(target), f"{page}: {link}"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with texts and a very short run of SmolLM2, whose model is hardly sparse."""
    folder = tmp_path_factory.mktemp("workspace")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in topics.values())
    (folder / "texts.jsonl").write_text(lines)
    with gzip.open(folder / "texts.jsonl.gz", "wt") as file:
        file.write(lines)
    (folder / "page.txt").write_text((ROOT / "scripts" / "page.txt").read_text())
    (folder / "quick.yaml").write_text("validation_tokens: 512\nheld_out_tokens: 1024\nlearning_rate: 2.0e-5\n")
    line = "gossamer sparsify smollm2 --text texts.jsonl --constraint kl --epsilon 0.2 --tokens 1024 --seq-len 64"
    run_shell(f"{line} --config quick.yaml --out runs/first", folder)
    return folder


def run_shell(script: str, folder: Path) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=folder, env={**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, f"{script}\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}"


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in GUIDES if any(not b.not_run for b in blocks(page))], ids=name_of)
def test_blocks_run(page: Path, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They run in the order of the page, in a folder with some texts and a finished run, under up to two names."""
    (tmp_path / "runs").mkdir()
    for file in ("texts.jsonl", "texts.jsonl.gz", "page.txt", "quick.yaml", "runs/first"):
        (tmp_path / file).symlink_to(workspace / file)
    if page.stem != "first-sparse-model":
        (tmp_path / "runs" / "tutorial").symlink_to(workspace / "runs" / "first")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks(page):
        if block.not_run is None and block.language == "bash":
            run_shell(block.text, tmp_path)
        elif block.not_run is None and block.language == "python":
            source = tmp_path / f"{page.stem}_{block.line}.py"  # nnsight needs the source file of a trace
            source.write_text(block.text)
            exec(compile(block.text, str(source), "exec"), names)
