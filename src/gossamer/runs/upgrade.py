"""Upgrade records of earlier versions to the current format.

Up to 0.1.0, ``config.json`` nested the settings like their classes (``training``, and ``multiplier`` inside it). It
counted steps instead of tokens, and contained the settings of both constraints (tau, slack and epsilon), whichever was
chosen. No record described in words what was bounded. Settings that only the trainer of that version had are left out.
"""

from typing import Any

_ONLY_THEN = ("multiplier", "objective", "validate_every", "final_rate")

_WORDS = {
    "ce": {"name": "ce", "symbol": "τ", "label": "loss"},
    "kl": {"name": "kl", "symbol": "ε", "label": "KL"},
}


def upgraded_record(record: dict[str, Any]) -> dict[str, Any]:
    """Convert the contents of a ``config.json`` of any version to the current format."""
    old = record.get("config", {})
    if not isinstance(old.get("training"), dict):
        return record
    training = dict(old["training"])
    config = {**{name: value for name, value in old.items() if name != "training"}, **training}
    for name in _ONLY_THEN:
        config.pop(name, None)
    blocks_per_step = config["batch_size"] * config["gradient_accumulation"] * config["processes"]
    config["tokens"] = config.pop("steps") * blocks_per_step * config["seq_len"]
    if config["constraint"] == "kl":
        bound, others = config["epsilon"], ["tau", "slack"]
    else:
        bound, others = record["measured"]["tau"], ["epsilon"]
    for name in others:
        del config[name]
    return {**record, "config": config, "constraint": {**_WORDS[config["constraint"]], "bound": bound}}


def upgraded_metrics(metrics: dict[str, Any]) -> dict[str, Any]:
    """Convert the contents of a ``metrics.json`` of any version: add the current description of the constraint."""
    if "constraint" not in metrics or "constraint_label" in metrics:
        return metrics
    name = metrics["constraint"]
    keys = ("kl", "epsilon") if name == "kl" else ("loss_sparse", "tau")
    words = _WORDS[name]
    return {
        **metrics,
        "constraint_symbol": words["symbol"],
        "constraint_label": words["label"],
        "constraint_value": metrics[keys[0]],
        "constraint_bound": metrics[keys[1]],
    }
