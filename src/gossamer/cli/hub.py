"""The command push: upload the model of a run, or a saved one, to the Hugging Face Hub."""

from pathlib import Path
from typing import Annotated

import typer

from gossamer.cli.common import app, console, warn
from gossamer.errors import GossamerError


@app.command()
def push(
    target: Annotated[Path, typer.Argument(help="A finished run, a saved sparse model, or adapters with gates.")],
    repository: Annotated[str, typer.Argument(help="Repository id, org/name; created if it does not exist.")],
    license: Annotated[
        str | None, typer.Option(help="License for the model card: apache-2.0, mit, llama3.2, other.")
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(help="The dense model's id on the Hub.", show_default="as the run names it")
    ] = None,
    adapter: Annotated[
        bool,
        typer.Option("--adapter", help="Push only the adapters and gates of a run with LoRA, not the whole model."),
    ] = False,
    private: Annotated[
        bool | None,
        typer.Option(
            "--private/--public", help="Visibility of a repository that is created.", show_default="the account's"
        ),
    ] = None,
    message: Annotated[str, typer.Option(help="Commit message.")] = "Upload a model made with gossamer",
) -> None:
    """Push TARGET to REPOSITORY on the Hugging Face Hub, with a model card. Log in first: hf auth login."""
    from huggingface_hub.utils import disable_progress_bars

    from gossamer.models.checkpoint import is_run, is_saved_model
    from gossamer.models.hub import push_folder
    from gossamer.models.lora_files import is_adapter
    from gossamer.runs.card import run_card
    from gossamer.runs.record import Run

    card = None
    if is_run(target):
        run = Run(target)
        folder = run.adapter if adapter else run.model
        if not folder.exists():
            what = "adapters; it was not trained with --train lora" if adapter else "sparse model yet; finish it first"
            raise GossamerError(f"{target} has no {what}")
        card = run_card(run, repository, adapter=adapter, base_model=base_model)
    elif is_saved_model(target) or is_adapter(target):
        folder = target
        for option, given in (("--adapter", adapter), ("--base-model", base_model)):
            if given:
                raise GossamerError(f"{option} goes with a run; {target} is pushed as it is, with its own model card")
    else:
        raise GossamerError(f"{target} is no run, no saved sparse model and no directory of adapters")
    if license is None:
        warn("the model card names no licence; say which one with --license")
    with console.status("pushing"):
        disable_progress_bars()
        address = push_folder(folder, repository, card=card, license=license, private=private, message=message)
    console.print(address, markup=False, highlight=False, soft_wrap=True)
