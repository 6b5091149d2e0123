"""Push gated models and adapters to the Hugging Face Hub through its client."""

from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gossamer.models.checkpoint import save
from gossamer.models.lora import has_adapters
from gossamer.models.lora_files import save_adapter
from gossamer.models.repositories import hub_faults

MESSAGE = "Upload a model made with gossamer"


def push_to_hub(
    model: PreTrainedModel,
    repository: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    license: str | None = None,
    private: bool | None = None,
    message: str = MESSAGE,
) -> str:
    """Push a gated model to the Hub, or only its adapters and gates if it has adapters, with a model card.

    Args:
        model: gated; if it has adapters that are not merged, only those and the gates are pushed.
        repository: its id, ``org/name``; created if it does not exist. Files of the same names are replaced.
        tokenizer: pushed along with a whole model.
        license: identifier for the model card, ``apache-2.0`` for example; the card names none if None.
        private: whether a new repository is private; the account's default if None.
        message: commit message.

    Returns:
        The URL of the repository.

    Raises:
        GossamerError: if the model has no gates; if the Hub cannot be reached or refuses.
    """
    with TemporaryDirectory() as parent:
        folder = Path(parent) / "model"
        if has_adapters(model):
            save_adapter(model, folder)
        else:
            save(model, folder, tokenizer)
        return push_folder(folder, repository, license=license, private=private, message=message)


def push_folder(
    folder: Path,
    repository: str,
    *,
    card: ModelCard | None = None,
    license: str | None = None,
    private: bool | None = None,
    message: str = MESSAGE,
) -> str:
    """Push a directory that :func:`gossamer.save` or :func:`gossamer.save_adapter` wrote, as :func:`push_to_hub` does.

    Args:
        card: replaces the model card in the directory.

    Raises:
        GossamerError: if the Hub cannot be reached or refuses.
    """
    card = ModelCard.load(folder / "README.md") if card is None else card
    if license is not None:
        card.data["license"] = license
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file != folder / "README.md")
    operations = [CommitOperationAdd("README.md", str(card).encode())]
    operations += [CommitOperationAdd(file.relative_to(folder).as_posix(), file) for file in files]
    with hub_faults(repository, f"you may not write to {repository} on the Hub, or are not logged in: hf auth login"):
        api = HfApi(library_name="gossamer")
        made = api.create_repo(repository, private=private, exist_ok=True)
        api.create_commit(made.repo_id, operations, commit_message=message)
    return str(made)
