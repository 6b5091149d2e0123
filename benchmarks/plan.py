"""Compare the peak memory that ``gossamer plan`` estimates with the peak of real training steps on a CPU.

    python benchmarks/plan.py [--only WORD] [--copy] [--record FILE]

Each case trains a randomly initialised model for three steps on random tokens, in a separate process. If all lengths of
one model are run (`--only length`), a line and a parabola are fitted to the measurements. The measurement is the peak
resident set from building the model on, minus a baseline that is printed too: the resident set after training a tiny
model, when everything is imported and compiled. The estimate is the largest of the plan's moments for a CPU. Only
memory is compared, because the time estimate depends on a peak rate and a utilisation that the user supplies.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attention import record
from transformers import AutoConfig, AutoModelForCausalLM

from gossamer import add_gates
from gossamer.models.lora import add_adapters
from gossamer.runs.plan import plan_run
from gossamer.runs.presets import presets
from gossamer.runs.settings import RunConfig
from gossamer.training.sparsity import SparsityTrainer
from gossamer.training.trainer import freeze_except, no_dropout
from training import Blocks

SMOL = presets()["smollm2"].config
GPT2 = presets()["gpt2"].config
SMALL = {"model_type": "llama", "vocab_size": 32000, "hidden_size": 512, "intermediate_size": 1536,
         "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4,
         "max_position_embeddings": 4096}  # fmt: skip
TINY = {**SMALL, "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}


def run(**settings: Any) -> RunConfig:
    """The configuration of a run with these settings."""
    return RunConfig.from_dict({"model": "", "text": "", **settings})


CASES: dict[str, tuple[dict[str, Any], RunConfig]] = {
    "SmolLM2-135M, T=256, batch 1": (SMOL, run(batch_size=1)),
    "SmolLM2-135M, T=256, batch 4": (SMOL, run()),
    "SmolLM2-135M, T=1,024, batch 1": (SMOL, run(seq_len=1024, batch_size=1)),
    "SmolLM2-135M, T=1,024, batch 4": (SMOL, run(seq_len=1024)),
    "SmolLM2-135M, T=256, batch 4, float32": (SMOL, run(precision="fp32")),
    "SmolLM2-135M, T=256, batch 4, attention": (SMOL, run(train="attention")),
    "SmolLM2-135M, T=256, batch 4, LoRA": (SMOL, run(train="lora")),
    "SmolLM2-135M, T=1,024, batch 4, checkpointing": (SMOL, run(seq_len=1024, gradient_checkpointing=True)),
    "SmolLM2-135M, T=256, batch 4, KL": (SMOL, run(constraint="kl")),
    "SmolLM2-135M, T=256, batch 4, LoRA, KL": (SMOL, run(train="lora", constraint="kl")),
    "SmolLM2-135M, T=256, batch 2 × 2": (SMOL, run(batch_size=2, gradient_accumulation=2)),
    "GPT-2 124M, T=512, batch 2": (GPT2, run(seq_len=512, batch_size=2)),
    "LLaMA 8 × 512, T=512, batch 4": (SMALL, run(seq_len=512)),
}
LENGTHS = {f"LLaMA 8 × 512, length {tokens:,}": tokens for tokens in (256, 512, 1024, 2048, 4096)}
CASES |= {name: (SMALL, run(seq_len=tokens, batch_size=1)) for name, tokens in LENGTHS.items()}


def train(config: dict[str, Any], settings: RunConfig, *, copy: bool = False) -> None:
    fields = dict(config)
    with torch.random.fork_rng():
        model = add_gates(AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields)),
                         inplace=True)  # fmt: skip
    training = replace(settings.training, checkpoint_every=0, validations=1)
    reference = None
    if training.constraint.needs_dense and (copy or training.train != "lora"):
        reference = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **fields))
        reference = reference.to(torch.bfloat16) if training.precision == "bf16" else reference
    if training.train == "lora":
        add_adapters(model, rank=settings.lora_rank, alpha=1.0)
    else:
        freeze_except(model, training.train)
    blocks = Blocks(3 * training.blocks_per_step, settings.seq_len, config["vocab_size"])
    with tempfile.TemporaryDirectory() as folder:
        trainer = SparsityTrainer(model, reference, 3.0, training, blocks, blocks.rows[:1, :16], Path(folder), steps=3)
        with no_dropout(model):
            trainer.prepare(open_gates=False)
            trainer.train()


def resident(key: str) -> float:
    """Resident memory in megabytes: current for key VmRSS, peak since the last reset for VmHWM."""
    return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0]) / 1024


def measure(name: str, *, copy: bool) -> None:
    """Measure one case in this process and print the result."""
    config, settings = CASES[name]
    tiny = run(**{**settings.to_dict(), "seq_len": min(settings.seq_len, 128), "batch_size": 1})
    train(TINY, tiny)
    baseline = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    train(config, settings, copy=copy)
    print(json.dumps({"baseline": baseline, "measured": resident("VmHWM") - baseline}))


def fit(points: list[tuple[int, float]]) -> dict[str, float]:
    """Fit memory over length: a least-squares line, and the share of a fitted parabola's quadratic term."""
    tokens, megabytes = (np.array(column, dtype=float) for column in zip(*points, strict=True))
    slope, start = np.polyfit(tokens, megabytes, 1)
    return {
        "start_megabytes": start,
        "kilobytes_per_token": slope * 1024,
        "largest_residual_megabytes": np.abs(start + slope * tokens - megabytes).max(),
        "share_of_square_at_longest": np.polyfit(tokens, megabytes, 2)[0] * tokens[-1] ** 2 / megabytes[-1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--record", type=Path, help="write the figures here")
    parser.add_argument("--copy", action="store_true", help="with LoRA, take the KL to a copy of the dense model")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        return measure(arguments.case, copy=arguments.copy)
    result = record(arguments)
    result["rows"] = []
    for name, (config, settings) in CASES.items():
        if arguments.only not in name:
            continue
        command = [sys.executable, __file__, "--case", name, *(["--copy"] if arguments.copy else [])]
        found = json.loads(
            subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
        )
        plan = plan_run(config, settings, "cpu")
        moment = max(plan.moments, key=lambda m: sum(plan.moments[m].values()))
        row = {"case": name, "settings": settings.to_dict(), "estimate_megabytes": plan.peak / 2**20, "moment": moment,
               "measured_megabytes": found["measured"], "baseline_megabytes": found["baseline"]}  # fmt: skip
        result["rows"].append(row)
        print(f"{name:48} {row['estimate_megabytes']:7.0f} : {found['measured']:7.0f} MB "
              f"({row['estimate_megabytes'] / found['measured']:.2f})  {moment}; baseline {found['baseline']:.0f} MB",
              flush=True)  # fmt: skip
    points = [(LENGTHS[row["case"]], row["measured_megabytes"]) for row in result["rows"] if row["case"] in LENGTHS]
    if len(points) == len(LENGTHS):
        result["fit"] = fit(points)
        print(json.dumps(result["fit"]))
    if arguments.record:
        arguments.record.parent.mkdir(parents=True, exist_ok=True)
        arguments.record.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
