"""The documentation as a site: `bash scripts/docs` builds it."""

import json
import re
import subprocess
import sys
from dataclasses import MISSING
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

import gossamer
from gossamer.fields import Setting
from gossamer.runs.settings import settings

HERE = Path(__file__).parent
CARD = "src/gossamer/shipped/smollm2-sparse/README.md"

project = "gossamer"
version = release = gossamer.__version__
project_copyright = "the gossamer authors, Apache 2.0"

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build"]
nitpicky = True
nitpick_ignore_regex = [
    # Names of other packages, which are not built here, and shapes, which are texts.
    (r"py:.*", r"(torch|transformers|jaxtyping|transformer_lens|matplotlib|numpy|rich|huggingface_hub)\..*"),
    (r"py:.*", r"(os|pathlib|random|collections|dataclasses)\..*"),
    (r"py:.*", r"(Tensor|Float|Int|Bool|Figure|TransformerBridge|LoraConfig|tuple|typing)\b.*|'.*|optional"),
    # What no one calls.
    (r"py:.*", r"gossamer\.(tables|models\.architectures|training\.(trainer|sparsity|trackers|objective))\b.*"),
    (r"py:class", r"gossamer\.(measures\.language\.Measured|circuits\.(projections|streams)\.\w+|.*\._\w+)"),
]

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
maximum_signature_line_length = 80
python_use_unqualified_type_names = True

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4
nb_execution_mode = "off"  # their outputs are stored, and a test runs them
copybutton_exclude = ".linenos, .gp, .go"

smartquotes_action = "qe"  # quotes and ellipses; dashes would turn --out into –out

html_show_search_summary = False  # the pages are not to be fetched from disk
html_theme = "furo"
html_title = f"gossamer {version}"
html_theme_options = {"navigation_with_keys": True}


def generate_reference(_: Sphinx) -> None:
    """Write the pages of the reference that are made from the code, and the card of the model that comes with it."""
    command = [sys.executable, "-m", "typer", "gossamer.cli", "utils", "docs", "--name", "gossamer"]
    commands = subprocess.run([*command, "--title", "Commands"], check=True, capture_output=True, text=True).stdout
    # The list at the top cuts what it says of each command; the headings that follow say it in full.
    commands = re.sub(r"\*\*Commands\*\*:\n.*?(?=^## )", "", commands, flags=re.DOTALL | re.MULTILINE)
    card = (HERE.parent / CARD).read_text(encoding="utf-8").partition("\n---\n")[2]
    for name, text in (("commands", commands), ("settings", settings_page()), ("smollm2-sparse", card)):
        page = HERE / "reference" / f"{name}.md"
        if not page.exists() or page.read_text(encoding="utf-8") != text:
            page.write_text(text, encoding="utf-8")


def settings_page() -> str:
    """Every setting of a run: name, default, meaning and values."""
    known = [one for one in settings().values() if not one.recorded]
    return _SETTINGS.format(rows="\n".join(map(_row, known)))


_SETTINGS = """# Settings

All settings of a run, as `gossamer settings` prints them and a file for `--config` has them, one `name: value` a line.
`gossamer sparsify --help` lists those that are options too; there they are spelled with dashes.

| name | default | meaning |
|---|---|---|
{rows}
"""


def _row(one: Setting) -> str:
    default = "needed" if one.default is MISSING else f"`{'null' if one.default is None else one.default}`"
    of = f" Of the constraint `{'` and `'.join(one.kinds)}`." if one.kinds else ""
    return f"| `{one.name}` | {default} | {one.help}{of} {one.wanted[0].upper()}{one.wanted[1:]}. |"


def name_files_of_the_repository(app: Sphinx, docname: str, source: list[str]) -> None:
    """Links from a page to files outside the site: the site has no such files, so it names them."""

    def named(link: re.Match[str]) -> str:
        text, target = link.groups()
        path = ((HERE / docname).parent / target).resolve()
        if path.is_relative_to(HERE):
            return link.group()
        if path == HERE.parent / CARD:
            return f"[{text}](/reference/smollm2-sparse.md)"
        name = f"`{path.relative_to(HERE.parent)}`"
        return name if text.strip("`") in name else f"{text} ({name})"

    source[0] = re.sub(r"(?<!!)\[([^\]]+)\]\((\.\./[^)#\s]+)(?:#[^)\s]*)?\)", named, source[0])


def link_to_colab(_: Sphinx, docname: str, source: list[str]) -> None:
    """Notebooks run on Colab, once the package says where its repository is."""
    urls = dict(url.split(", ", 1) for url in metadata("gossamer").get_all("Project-URL") or ())
    if not docname.startswith("notebooks/") or "Repository" not in urls:
        return
    repository = urls["Repository"].rstrip("/").partition("github.com/")[2]
    notebook = json.loads(source[0])
    target = f"https://colab.research.google.com/github/{repository}/blob/main/docs/{docname}.ipynb"
    notebook["cells"][0]["source"] = [*notebook["cells"][0]["source"], f"\n\n[Open in Colab]({target})"]
    source[0] = json.dumps(notebook)


def keep_indented_blocks(_: Sphinx, what: str, _name: str, _object: object, _options: object, lines: list[str]) -> None:
    """Show what stands indented in a module's docstring, formulas and files, as it is written."""
    if what != "module":
        return
    shown: list[str] = []
    inside = False
    for line in lines:
        if line.strip():
            begins = line.startswith("    ") and not inside and not shown[-1].strip()
            introduced = next((before for before in reversed(shown) if before.strip()), "").endswith("::")
            shown += ["::", ""] if begins and not introduced else []
            inside = line.startswith("    ")
        shown.append(line)
    lines[:] = shown


def parse_defaults(*event: Any) -> tuple[str, str] | None:
    """Write ``...`` for a default like ``<factory>``: Sphinx cannot parse it, nor then the types beside it."""
    *_, signature, returned = event
    return None if signature is None else (re.sub(r"= <(?:[^<>]|<[^<>]*>)*>", "= ...", signature), returned)


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-signature", parse_defaults)
    app.connect("autodoc-process-docstring", keep_indented_blocks, priority=400)
    app.connect("builder-inited", generate_reference)
    app.connect("source-read", name_files_of_the_repository)
    app.connect("source-read", link_to_colab)
