"""Compare a sparse training step of a whole model with dense fine-tuning of the same parameters: time and memory.

    python benchmarks/training.py [--tokens 256 1024] [--train attention] [--precision bf16] [--record FILE]

The kinds of training alternate, each in a separate process that runs gossamer's trainer for a few steps on random
tokens; the first steps are not counted. Step times are medians. Peak memory is the peak of the process: its resident
set, or on a GPU the memory that torch allocated. A step has 1,024 tokens unless --batch is given.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from attention import GPU, record
from transformers import TrainerCallback

from gossamer import add_gates
from gossamer.models.pretrained import load_dense
from gossamer.training.malloc import keep_freed_memory
from gossamer.training.settings import TrainingConfig
from gossamer.training.sparsity import SparsityTrainer
from gossamer.training.trainer import PostTrainer, freeze_except, no_dropout

KINDS = ("dense", "sampled", "hard")


class Clock(TrainerCallback):
    """Measures the seconds of each step."""

    def __init__(self) -> None:
        self.started = 0.0
        self.seconds: list[float] = []

    def on_step_begin(self, *_: object, **__: object) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, *_: object, **__: object) -> None:
        if GPU:
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.started)


class Blocks(torch.utils.data.Dataset):
    """Blocks of random tokens."""

    def __init__(self, count: int, tokens: int, vocabulary: int) -> None:
        self.rows = torch.randint(vocabulary, (count, tokens), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index]}


def train(arguments: argparse.Namespace) -> None:
    """Train one kind in this process; prints seconds per step and peak megabytes."""
    keep_freed_memory()
    tokens, batch = arguments.tokens[0], arguments.batch or max(1, 1024 // arguments.tokens[0])
    model, _ = load_dense(arguments.model)
    config = TrainingConfig(
        train=arguments.train, batch_size=batch, precision=arguments.precision,
        checkpoint_every=0, validations=1, hard_fraction=1.0 if arguments.kind == "hard" else 0.0,
    )  # fmt: skip
    blocks = Blocks(arguments.steps * batch, tokens, model.config.vocab_size)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.kind == "dense":
            freeze_except(model, arguments.train)
            trainer = PostTrainer(model, config, blocks, Path(folder), steps=arguments.steps, callbacks=[clock])
        else:
            gated = add_gates(model)
            freeze_except(gated, arguments.train)
            trainer = SparsityTrainer(
                gated,
                model.to(torch.bfloat16) if arguments.precision == "bf16" else model,
                3.0,
                config,
                blocks,
                blocks.rows[:1],
                Path(folder),
                steps=arguments.steps,
                callbacks=[clock],
            )
            trainer.prepare(open_gates=True)
        with no_dropout(trainer.model):
            trainer.train()
    # The last step of sparse training ends with a validation.
    counted = clock.seconds[arguments.warm_up : -1]
    peak = torch.cuda.max_memory_allocated() / 2**20 if GPU else _peak_resident()
    print(json.dumps({"seconds": counted, "megabytes": peak, "tokens_per_step": batch * tokens}))


def _peak_resident() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, nargs="*", default=[256, 1024])
    parser.add_argument("--batch", type=int)
    parser.add_argument("--train", choices=["all", "attention"], default="all")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--record", type=Path, help="write the figures here")
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.kind:
        return train(arguments)
    result = record(arguments)
    result["rows"] = []
    for tokens in arguments.tokens:
        found: dict[str, list[dict]] = {kind: [] for kind in KINDS}
        for _ in range(arguments.rounds):
            for kind in KINDS:
                options = {"kind": kind, "tokens": tokens}
                options |= {name: getattr(arguments, name) for name in ("model", "train", "precision", "steps")}
                options |= {"warm-up": arguments.warm_up} | ({"batch": arguments.batch} if arguments.batch else {})
                command = [sys.executable, __file__, *(f"--{key}={value}" for key, value in options.items())]
                output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                found[kind].append(json.loads(output.splitlines()[-1]))
        for kind in KINDS:
            seconds = statistics.median(x for run in found[kind] for x in run["seconds"])
            row = {
                "tokens": tokens, "kind": kind, "seconds_per_step": seconds,
                "tokens_per_second": found[kind][0]["tokens_per_step"] / seconds,
                "peak_megabytes": max(run["megabytes"] for run in found[kind]),
            }  # fmt: skip
            result["rows"].append(row)
            dense = next(x for x in result["rows"] if x["tokens"] == tokens and x["kind"] == "dense")
            print(f"T={tokens:<5} {kind:8} {seconds:6.2f} s/step ({seconds / dense['seconds_per_step']:.2f})  "
                  f"{row['tokens_per_second']:6.0f} tokens/s  {row['peak_megabytes']:6.0f} MB "
                  f"({row['peak_megabytes'] / dense['peak_megabytes']:.2f})", flush=True)  # fmt: skip
    if arguments.record:
        arguments.record.parent.mkdir(parents=True, exist_ok=True)
        arguments.record.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
