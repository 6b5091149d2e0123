"""The calls of test_hub.py to the Hub, in a separate process that prints the results as a line of JSON."""

import contextlib
import io
import json
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftConfig
from transformers import PreTrainedModel

import gossamer
from gossamer.cli import main


def told(do: Callable[[], object]) -> str:
    """Get the message of an error, or the result's repr if there is none."""
    try:
        return repr(do())
    except gossamer.GossamerError as error:
        return str(error)


def command(*line: str) -> tuple[object, str, str]:
    """Run the command line; return exit code, stdout and stderr."""
    sys.argv = ["gossamer", *line]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
            code: object = 0
        except SystemExit as stopped:
            code = stopped.code
    return code, out.getvalue(), err.getvalue()


@torch.no_grad()
def same(a: PreTrainedModel, b: PreTrainedModel) -> bool:
    ids = torch.arange(12)[None]
    with gossamer.counted_links(a) as first, gossamer.counted_links(b) as second:
        equal = torch.equal(a(input_ids=ids).logits, b(input_ids=ids).logits)
    return equal and all(torch.equal(first[layer].open_links, second[layer].open_links) for layer in first)


def online(folder: str) -> dict[str, Any]:
    """Push, load and use models; ``folder`` contains whole/, adapter/ and run/."""
    found: dict[str, Any] = {}
    whole, tokenizer = gossamer.load(f"{folder}/whole"), gossamer.load_tokenizer(f"{folder}/whole")
    found["address"] = gossamer.push_to_hub(whole, "org/whole", tokenizer, license="apache-2.0", private=True)
    found["whole is the same"] = same(gossamer.load("org/whole"), whole)
    adapted = gossamer.load_adapter(f"{folder}/adapter", merge=False)
    gossamer.push_to_hub(adapted, "org/adapter", license="mit")
    found["adapters are the same"] = same(gossamer.load_adapter("org/adapter", merge=False), adapted)
    found["loads merged"] = same(gossamer.load("org/adapter"), gossamer.load(f"{folder}/adapter"))
    ids = tokenizer("the sparse model").input_ids
    for name in ("whole", "adapter"):
        found[f"tokenizer of {name}"] = gossamer.load_tokenizer(f"org/{name}")("the sparse model").input_ids == ids
    found["rank that peft reads"] = PeftConfig.from_pretrained("org/adapter").r
    run = f"{folder}/run"
    found["push run"] = command("push", run, "org/run", "--license", "apache-2.0", "--base-model", "org/dense")
    found["push adapters"] = command("push", run, "org/run-adapter", "--adapter")
    found["inspect"] = command("inspect", "org/run")
    found["dense"] = told(lambda: gossamer.load("org/dense"))
    found["missing"] = told(lambda: gossamer.load("org/missing"))
    found["revision"] = told(lambda: gossamer.load("org/whole", revision="v9"))
    found["no gates"] = told(lambda: gossamer.push_to_hub(gossamer.remove_gates(whole), "org/dense"))
    found["bad id"] = told(lambda: gossamer.push_to_hub(whole, "a/b/c"))
    del os.environ["HF_TOKEN"]
    found["no token"] = told(lambda: gossamer.push_to_hub(whole, "org/refused"))
    return found


def offline() -> tuple[bool, str]:
    """Load a model without a network, after ``online`` with the same cache."""
    return gossamer.is_gated(gossamer.load("org/whole")), told(lambda: gossamer.load("org/never-fetched"))


if __name__ == "__main__":
    print(json.dumps({"online": online, "offline": offline}[sys.argv[1]](*sys.argv[2:])))
