"""Code blocks and links in the pages of the documentation."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[1]
GUIDES = sorted(
    [ROOT / "README.md", *(page for part in ("tutorials", "guides") for page in (ROOT / "docs" / part).glob("*.md"))]
)
"""Pages whose code is run. Other pages are records of past runs, formulas, or the reference."""

_MADE_BY_THE_SITE = ("commands.md", "settings.md", "smollm2-sparse.md")
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", ROOT / "CODE_OF_CONDUCT.md"]
    + [ROOT / "benchmarks" / "README.md"]
    + [page for page in ROOT.glob("docs/[!_]*/**/*.md") if page.name not in _MADE_BY_THE_SITE]
    + list(ROOT.glob("docs/*.md"))
)


@dataclass(frozen=True)
class Block:
    """A fenced block of code; ``not_run`` is the reason given in a comment before it."""

    line: int
    language: str
    text: str
    not_run: str | None


def blocks(page: Path) -> Iterator[Block]:
    """Yield the code blocks of a page in order. An indented block has no language."""
    before = ""
    for token in MarkdownIt().parse(page.read_text(encoding="utf-8")):
        if token.type in ("fence", "code_block"):
            reason = re.fullmatch(r"<!-- not run: (.+) -->", before)
            yield Block(token.map[0] + 1, token.info.strip(), token.content, reason and reason.group(1))
        before = token.content.strip() if token.type == "html_block" else ""


def gossamer_lines(script: str) -> Iterator[list[str]]:
    """Yield the arguments of every ``gossamer`` in a shell script, including those that a launcher starts."""
    for inner in re.findall(r"\$\((gossamer [^)]*)\)", script):
        yield shlex.split(inner)[1:]
    for line in re.sub(r"\\\n", " ", re.sub(r"\$\([^)]*\)", "substituted", script)).splitlines():
        words = shlex.split(line.partition(" > ")[0], comments=True)
        if "gossamer" in words and words[0] in ("gossamer", "accelerate", "torchrun"):
            yield words[words.index("gossamer") + 1 :]


def inline_code(page: Path) -> Iterator[str]:
    """Yield the inline code of a page."""
    for token in MarkdownIt().enable("table").parse(page.read_text(encoding="utf-8")):
        yield from (child.content for child in token.children or () if child.type == "code_inline")


def links(page: Path) -> Iterator[str]:
    """Yield the targets of a page's links and images."""
    for token in MarkdownIt().enable("table").parse(page.read_text(encoding="utf-8")):
        for child in token.children or ():
            target = child.attrs.get("href") or child.attrs.get("src")
            if target:
                yield str(target)


def anchors(page: Path) -> set[str]:
    """Get the anchors of a page's headings on GitHub and on the site."""
    parsed = MarkdownIt().parse(page.read_text(encoding="utf-8"))
    headings = [after.content for token, after in pairwise(parsed) if token.type == "heading_open"]
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "") for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in plain}
