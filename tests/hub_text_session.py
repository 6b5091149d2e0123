"""The runs of runs/test_fingerprints.py on a Hub data set, in a separate process that prints a line of JSON."""

import io
import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from hub_server import Hub, served_hub


def rows(seed: int) -> bytes:
    from conftest import sentences

    return "".join(json.dumps({"text": row}) + "\n" for row in sentences(300, seed)).encode()


def session(hub: Hub, folder: Path, model: str) -> dict[str, Any]:
    import torch
    from rich.console import Console
    from safetensors.torch import load_file

    from gossamer import GossamerError
    from gossamer.evaluation.evaluate import evaluate_run
    from gossamer.evaluation.lengths import add_lengths
    from gossamer.runs.job import post_train
    from gossamer.runs.record import Run
    from gossamer.runs.settings import RunConfig
    from gossamer.training.settings import TrainingConfig

    class Stops(Console):
        """Interrupts the training after the second step."""

        def print(self, *_: object, **__: object) -> None:
            log = folder / "begun" / "training.jsonl"
            if log.exists() and len(log.read_text().splitlines()) == 2:
                raise KeyboardInterrupt

    def told(do: Any) -> str:
        try:
            return repr(do())
        except GossamerError as error:
            return str(error)

    training = TrainingConfig(batch_size=2, checkpoint_every=1, precision="fp32")
    sizes = {"tokens": 4 * 2 * 16, "seq_len": 16, "validation_tokens": 32, "held_out_tokens": 64}
    config = RunConfig(model, "org/text", control=False, stream=True, stream_workers=0, training=training, **sizes)
    hub.repositories["org/text"] = {"commits": {}, "tags": {}, "main": "", "private": False}
    first = hub.commit("org/text", {"train.jsonl": rows(0)})
    whole = post_train(config, folder / "whole")
    evaluate_run(whole)
    lengths = add_lengths(whole, [8])["lengths"]
    with suppress(KeyboardInterrupt):
        post_train(config, folder / "begun", console=Stops(file=io.StringIO()))
    found: dict[str, Any] = {"recorded": Run(folder / "begun").record()["fingerprints"]["commit"], "first": first}
    second = hub.commit("org/text", {"train.jsonl": rows(7), "more.jsonl": rows(8)})
    resumed = post_train(config, folder / "begun", resume=True)
    weights = [load_file(run.model / "gossamer.safetensors") for run in (whole, resumed)]
    found["the same"] = all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    found["lengths are the same"] = add_lengths(whole, [8])["lengths"] == lengths
    later = post_train(config, folder / "later")
    found["later"] = [later.record()["fingerprints"]["commit"], second]
    del hub.repositories["org/text"]["commits"][first]
    found["resume"] = told(lambda: post_train(config, folder / "begun", resume=True))
    found["lengths"] = told(lambda: add_lengths(whole, [8]))
    return found


if __name__ == "__main__":
    with served_hub() as hub:
        # The client reads these when it is imported.
        os.environ.update(HF_ENDPOINT=hub.endpoint, HF_HUB_OFFLINE="0", HF_HOME=sys.argv[1], HF_HUB_DISABLE_XET="1")
        print(json.dumps(session(hub, Path(sys.argv[1]), sys.argv[2])))
