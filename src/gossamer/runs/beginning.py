"""Start of a run: check all input, then write the token blocks, the settings and the dense loss."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gossamer.errors import GossamerError
from gossamer.files import atomic_directory, atomic_write_text, file_checksum, same_file
from gossamer.measures.language import measure_language
from gossamer.models.architectures import architecture_of
from gossamer.models.checkpoint import load
from gossamer.models.fingerprint import weights_fingerprint
from gossamer.models.lora import adapter_targets
from gossamer.models.pretrained import load_dense
from gossamer.models.vocabulary import require_embeddings
from gossamer.names import SELF
from gossamer.runs.memory import require_memory
from gossamer.runs.record import Run, load_control, versions
from gossamer.runs.settings import RunConfig
from gossamer.training.data import BlockCounts, Blocks, load_blocks
from gossamer.training.data_sets import at_commit, data_set_commit
from gossamer.training.documents import skipped_files, text_fingerprint
from gossamer.training.stream import unseen_blocks

Progress = Callable[[int, int], None]


def begin(
    run: Run,
    config: RunConfig,
    progress: Progress,
    *,
    resume: bool = False,
    warn: Callable[[str], None] = lambda line: None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Write the files that a run starts from, or check those of a run that is resumed.

    Args:
        run: the run; its directory must not exist, or with ``resume`` may hold a run with the same settings.
        config: the requested settings.
        progress: see :func:`blocks_of`.
        resume: continue the run if its directory exists.
        warn: called with one line if files of the text are skipped.

    Returns:
        The dense model and its tokenizer.

    Raises:
        GossamerError: on bad input, before anything is written; if the directory cannot be written.
    """
    config.check()
    if resume:
        if run.folder.exists():
            _check_same(run.config(), config, run.folder)
    elif run.folder.exists():
        raise GossamerError(f"{run.folder} exists already; go on with it by --resume, or give another --out")
    dense, tokenizer = load_dense(config.model)
    if run.folder.exists():
        _check_begun(run, config, dense, tokenizer)
    architecture_of(dense)
    if config.training.train == "lora":
        adapter_targets(dense, config.lora_targets)
    if config.start_from is not None:
        _check_start(config, dense)
    _check_length(dense, config)
    require_memory(config, dense)
    if not (run.folder / "config.json").exists():
        if config.text != SELF and (line := skipped_files(config.text)):
            warn(line)
        commit = data_set_commit(config.text)
        blocks = blocks_of(replace(config, text=at_commit(config.text, commit)), dense, tokenizer, progress)
        with atomic_directory(run.folder) as staging:
            write_beginning(staging, config, dense, blocks, commit)
    return dense, tokenizer


def _check_begun(run: Run, config: RunConfig, dense: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise unless the model, the blocks and a streamed text are those that the run was started with."""
    run.check_dense(dense)
    for blocks in (run.blocks("train"), run.blocks("validation"), run.blocks("held_out")):
        require_embeddings(dense, tokenizer, blocks, str(run.folder / "blocks.safetensors"))
    if config.stream:
        run.check_text()


def _check_same(begun: RunConfig, asked: RunConfig, folder: Path) -> None:
    before, now = begun.to_dict(), asked.to_dict()
    if begun.training.processes != asked.training.processes:
        raise GossamerError(
            f"{folder} was begun with {begun.training.processes} processes, not {asked.training.processes}; "
            "resume with as many, or give another --out"
        )
    for key in now:
        if before.get(key) != now[key] and not same_file(before.get(key), now[key]):
            raise GossamerError(
                f"{folder} was begun with {key}={before.get(key)!r}, not {now[key]!r}; "
                "resume with the same settings, or give another --out"
            )


def _check_start(config: RunConfig, dense: PreTrainedModel) -> None:
    earlier_runs = list(_starts(config))
    start = earlier_runs[0]
    folder = start.folder
    model = start.config().model
    if model != config.model and not same_file(model, config.model):
        raise GossamerError(f"--start-from {folder} is a run of {model}, not of {config.model}; give one of this model")
    if not start.model.exists():
        raise GossamerError(
            f"--start-from {folder} has no sparse model yet; finish it with gossamer sparsify ... --resume"
        )
    if config.control and not start.control.exists():
        raise GossamerError(f"--start-from {folder} has no dense control to train on; give --no-control")
    load(start.model)
    if config.control:
        load_control(start, "cpu")
    if config.training.train == "lora":
        raise GossamerError(
            f"--start-from {folder} does not go with --train lora: adapters are saved beside the dense model, "
            "not beside another run's; give --train all or attention"
        )
    start.check_dense(dense)
    for earlier in earlier_runs:
        before = earlier.config()
        if before.text != config.text and not same_file(before.text, config.text):
            continue
        if before.stream != config.stream:
            asked = "as well" if before.stream else "not"
            raise GossamerError(
                f"--start-from {folder} held out other parts of {config.text}, since it was run "
                f"{'with' if before.stream else 'without'} --stream; {'give it' if before.stream else 'do'} {asked}"
            )
        if config.text == SELF and before.training.seed == config.training.seed:
            raise GossamerError(
                f"--start-from {folder} was trained on the text that --text self samples from --seed "
                f"{config.training.seed}; give another --seed"
            )


def _starts(config: RunConfig) -> Iterator[Run]:
    """Follow ``start_from`` back: the run that this one starts from, then the run before it, and so on."""
    while config.start_from is not None:
        run = Run(Path(config.start_from))
        yield run
        config = run.config()


def _tokens_before(config: RunConfig) -> int:
    """Count the training tokens of all earlier runs in the chain of ``start_from``."""
    return sum(run.config().tokens_trained for run in _starts(config))


def _check_length(dense: PreTrainedModel, config: RunConfig) -> None:
    context = getattr(dense.config, "max_position_embeddings", None)
    if context is not None and config.seq_len > context:
        raise GossamerError(
            f"--seq-len {config.seq_len} is over the model's context of {context} tokens; give at most {context}"
        )


def blocks_of(
    config: RunConfig,
    dense: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    progress: Progress | None = None,
) -> Blocks:
    """Load the token blocks for a configuration; for a streamed text, only validation and held-out blocks.

    If the text is sampled from the model, ``progress`` is called with the number of blocks so far and the total.

    Raises:
        GossamerError: naming the text and what is wrong with it.
    """
    training = config.training
    counts = BlockCounts(
        seq_len=config.seq_len,
        train=config.steps * training.blocks_per_step,
        validation=max(1, config.validation_tokens // config.seq_len),
        held_out=max(1, config.held_out_tokens // config.seq_len),
    )
    if config.stream:
        return unseen_blocks(config.text, tokenizer, counts, model=dense)
    return load_blocks(config.text, tokenizer, counts, seed=training.seed, model=dense, progress=progress)


def write_beginning(
    folder: Path, config: RunConfig, dense: PreTrainedModel, blocks: Blocks, commit: str | None = None
) -> None:
    """Write the files that a run starts from: the blocks, the configuration and the dense model's loss.

    ``commit`` is the commit of the Hub data set that the blocks come from, if they come from one.
    """
    training = config.training
    dense_loss = measure_language(
        dense, blocks.validation, precision=training.precision, prompt_tokens=training.prompt_tokens
    ).loss
    parts = {name: part.int().contiguous() for name, part in vars(blocks).items()}
    save_file(parts, folder / "blocks.safetensors")
    record = {
        "config": config.to_dict(),
        "constraint": training.constraint.words(dense_loss),
        "versions": versions(),
        "fingerprints": {
            "model": weights_fingerprint(dense),
            "text": text_fingerprint(config.text),
            "commit": commit,
            "blocks": f"{file_checksum(folder / 'blocks.safetensors'):08x}",
        },
        "measured": {"loss_dense": dense_loss, "tokens_before": _tokens_before(config)},
    }
    atomic_write_text(folder / "config.json", json.dumps(record, indent=2) + "\n")
