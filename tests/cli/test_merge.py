"""gossamer merge."""

import json
from pathlib import Path

import torch

from command_line import assert_refused, gossamer_command, quick, weights
from families import tiny_model


def test_adapters_of_a_run_merge_into_its_model(saved_llama: Path, text: Path, tmp_path: Path) -> None:
    run, line = tmp_path / "run", ["sparsify", saved_llama, "--text", text, "--train", "lora", "--tokens", 256]
    refused = gossamer_command(*line, "--out", run, *quick(lora_targets=["q_proj", "w_proj"]))
    assert_refused(refused, "linear map 'w_proj'", "self_attn.q_proj")
    assert not run.exists()
    result = gossamer_command(
        *line,
        "--out",
        run,
        "--constraint",
        "kl",
        *quick(lora_rank=2, lora_alpha=6, lora_targets="q_proj, v_proj"),
    )
    assert result.returncode == 0, result.stderr
    adapter = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"], set(adapter["target_modules"])) == (2, 6, {"q_proj", "v_proj"})
    merge = ["merge", run / "adapter", "--out", tmp_path / "merged", "--model"]
    merged = gossamer_command(*merge, saved_llama)
    assert merged.returncode == 0, merged.stderr
    assert "gate bias" in merged.stdout
    a, b = weights(run), weights(tmp_path, "merged/gossamer.safetensors")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert (tmp_path / "merged" / "tokenizer.json").exists()
    assert_refused(gossamer_command(*merge, saved_llama), "merged exists already")
    other = tmp_path / "other"
    tiny_model("llama", seed=1).save_pretrained(other)
    for file in saved_llama.glob("tokenizer*"):
        (other / file.name).write_bytes(file.read_bytes())
    merge[3] = tmp_path / "another"
    assert_refused(gossamer_command(*merge, other), "is not the model that", "embed_tokens")
    merge[1] = run
    assert_refused(gossamer_command(*merge, saved_llama), "holds no adapters that gossamer saved")
    assert not (tmp_path / "another").exists()
