"""Model card of a run for the Hub: what the model is, how it was made and what was measured."""

import os
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from gossamer.errors import GossamerError
from gossamer.names import HUB_IDS, SELF
from gossamer.runs.record import Run

_METRICS = (
    ("open_fraction", "Open links / allowed links"),
    ("open_links_per_query", "Open links of a query and head"),
    ("kl", "KL(dense ‖ sparse), nats"),
    ("loss_sparse", "Cross-entropy, nats"),
)

_TEXT = """# A sparse-attention model made with gossamer

{base} with a hard on/off gate on every attention link, fine-tuned until few stay open. The weights were trained under
these gates and mean nothing without them:

```python
import gossamer

model = gossamer.load("{repository}")
tokenizer = gossamer.load_tokenizer("{repository}")
```

| | |
|---|---|
{rows}

Measured on {predictions:,} predictions of held-out text of the same kind, at {seq_len:,} tokens. The open fraction
depends on that length, and a bound that holds here need not hold on other text.
"""


def run_card(run: Run, repository: str, *, adapter: bool = False, base_model: str | None = None) -> ModelCard:
    """Create the model card of a run's sparse model or of its adapters.

    Args:
        run: a run that has been evaluated.
        repository: the Hub repository that the card is for.
        adapter: whether the repository holds only adapters and gates.
        base_model: the dense model's id on the Hub; None takes the id from the run, unless that is a directory.

    Raises:
        GossamerError: if the run has no metrics.
    """
    if not run.metrics.exists():
        raise GossamerError(f"{run.folder} has no metrics yet; gossamer evaluate {run.folder} measures them")
    metrics = run.read_metrics()
    named = HUB_IDS.get(metrics["model"], metrics["model"])
    base = base_model or (None if os.path.isabs(named) else named)
    text = _text_name(metrics["text"])
    results = [
        EvalResult("text-generation", "text", text, key, metrics[key], metric_name=name, task_name="Language modelling")
        for key, name in _METRICS
    ]
    data = ModelCardData(
        base_model=base,
        library_name="peft" if adapter else "gossamer",
        pipeline_tag="text-generation",
        tags=["gossamer", "sparse-attention", "interpretability", *(["lora"] if adapter else [])],
        model_name=repository.rpartition("/")[-1],
        eval_results=results,
        ignore_metadata_errors=False,
    )
    body = _TEXT.format(
        base=f"`{base}`" if base else f"A dense model (`{Path(named).name}`)",
        repository=repository,
        rows="\n".join(f"| {name} | {value} |" for name, value in _rows(metrics, text)),
        predictions=metrics["tokens_evaluated"],
        seq_len=metrics["seq_len"],
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}")


def _text_name(text: str) -> str:
    if text == SELF:
        return "sampled from the dense model"
    return Path(text).name if os.path.isabs(text) else text


def _rows(metrics: dict[str, Any], text: str) -> list[tuple[str, str]]:
    met = "met" if metrics["constraint_met"] else "**not met**"
    bound = f"{metrics['constraint_label']} at most {metrics['constraint_bound']:.4g} nats"
    loss = f"{metrics['loss_sparse']:.4f} nats; dense model {metrics['loss_dense']:.4f}"
    if (control := metrics["loss_dense_control"]) is not None:
        loss += f", dense model fine-tuned alike {control:.4f}"
    per_query = f"{metrics['open_links_per_query']:.3g} a query and head"
    tokens = metrics["tokens_trained"] + (metrics["tokens_trained_before"] or 0)
    return [
        ("bound", f"{bound}; {metrics['constraint_value']:.4g} measured, {met}"),
        ("open links", f"{100 * metrics['open_fraction']:.3g} %, {per_query}"),
        ("KL from the dense model", f"{metrics['kl']:.4f} nats"),
        ("loss", loss),
        ("sequence length", f"{metrics['seq_len']:,} tokens"),
        ("training", f"{tokens:,} tokens of {text}, seed {metrics['seed']}"),
        ("made with", f"gossamer {metrics['versions_trained'].get('gossamer', 'unknown')}"),
    ]
