"""Turn the adapters and gates of a run into the model shipped with gossamer: in bfloat16, measured, with a model card.

python results/smollm2/ship.py RUN OTHER_TEXT OUT

All measurements use the model as loaded from OUT, with its rounded adapters.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from gossamer.circuits.ability import measure_ability
from gossamer.circuits.tasks import TASKS
from gossamer.errors import GossamerError
from gossamer.evaluation.lengths import measure_at_length
from gossamer.models.lora_files import load_adapter, save_adapter
from gossamer.models.pretrained import load_dense
from gossamer.runs.record import Run
from gossamer.training.data import BlockCounts, load_blocks, pack

LENGTHS = (16, 32, 64, 256, 1024)
LENGTH_TOKENS = 8_192
ABILITIES = ("ioi", "greater-than", "gendered-pronoun", "agreement", "induction", "docstring")
PROMPTS = 100
PAGE = Path(__file__).parents[2] / "scripts" / "page.txt"
PAGE_LENGTH = 128

CARD = Path(__file__).parent / "card.md"


def main(run: Run, other: str, out: Path) -> None:
    config = run.config()
    dense, tokenizer = load_dense(config.model)
    save_adapter(load_adapter(run.adapter, config.model, merge=False), out, dtype=torch.bfloat16)
    sparse = load_adapter(out, config.model)
    record: dict[str, Any] = {
        "run": config.to_dict(),
        "tokens_trained": config.tokens_trained,
        "held_out": measure_at_length(sparse, dense, run.blocks("held_out"), "fp32"),
        "bound": run.record()["constraint"]["bound"],
    }
    record["run"].update(model="smollm2", text="textbooks, expository, jargon")
    held_out = record["held_out"]
    record["met"] = held_out["kl"] <= record["bound"]
    record["lengths"] = [_on_text(sparse, dense, tokenizer, config.text, length) for length in LENGTHS]
    record["other_text"] = _on_text(sparse, dense, tokenizer, other, config.seq_len)
    page = pack([PAGE.read_text()], tokenizer, PAGE_LENGTH, name=str(PAGE))
    record["page"] = measure_at_length(sparse, dense, page, "fp32")
    record["abilities"] = {}
    for name in ABILITIES:
        prompts = TASKS[name].prompts(tokenizer, PROMPTS, seed=0)
        models = {"dense": dense, "sparse": sparse}
        record["abilities"][name] = {key: vars(measure_ability(model, prompts)) for key, model in models.items()}
    (out / "metrics.json").write_text(json.dumps(record, indent=2) + "\n")
    lines = ["| T | loss, dense | sparse | KL | open (%) | open links a query and head |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {row['seq_len']:,} | {row['loss_dense']:.3f} | {row['loss_sparse']:.3f} | {row['kl']:.3f} ± "
        f"{row['kl_stderr']:.3f} | {100 * row['open_fraction']:.2f} | {row['open_links_per_query']:.2f} |"
        for row in record["lengths"]
    ]
    rights = ["| task | dense (%) | sparse (%) |", "|---|---|---|"]
    rights += [
        f"| {name} | {100 * both['dense']['accuracy']:.1f} | {100 * both['sparse']['accuracy']:.1f} |"
        for name, both in record["abilities"].items()
    ]
    novel = record["other_text"]
    card = CARD.read_text(encoding="utf-8").format(
        rank=config.lora_rank,
        tokens=config.tokens_trained,
        seq_len=config.seq_len,
        bound=record["bound"],
        kl=f"{held_out['kl']:.3f} ± {held_out['kl_stderr']:.3f}",
        met="met" if record["met"] else "not met",
        open_fraction=100 * held_out["open_fraction"],
        links=held_out["open_links_per_query"],
        loss_sparse=held_out["loss_sparse"],
        loss_dense=held_out["loss_dense"],
        difference_stderr=held_out["loss_difference_stderr"],
        seed=config.training.seed,
        length_tokens=LENGTH_TOKENS,
        by_length="\n".join(lines),
        other_sparse=novel["loss_sparse"],
        other_dense=novel["loss_dense"],
        other_kl=novel["kl"],
        other_open=100 * novel["open_fraction"],
        prompts=PROMPTS,
        abilities="\n".join(rights),
    )
    (out / "README.md").write_text(card, encoding="utf-8")
    print(card)


def _on_text(sparse, dense, tokenizer, text: str, length: int) -> dict[str, Any]:
    """Measure loss, KL and open links on the held-out part of a text."""
    counts = BlockCounts(seq_len=length, held_out=LENGTH_TOKENS // length)
    blocks = load_blocks(text, tokenizer, counts, seed=1).held_out
    return measure_at_length(sparse, dense, blocks, "fp32")


if __name__ == "__main__":
    try:
        if len(sys.argv) != 4:
            raise GossamerError("usage: ship.py RUN OTHER_TEXT OUT")
        torch.set_grad_enabled(False)
        main(Run(Path(sys.argv[1])), sys.argv[2], Path(sys.argv[3]))
    except GossamerError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
