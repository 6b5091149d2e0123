"""gossamer import."""

from pathlib import Path

import torch

import gossamer
from command_line import assert_refused, gossamer_command
from families import tiny_model


def test_import_leaves_a_sparse_model_or_nothing(saved_llama: Path, tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    linear = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    tensors = {name: t.T.contiguous() if name.endswith(linear) else t for name, t in model.state_dict().items()}
    torch.save({"model": tensors, "model_args": {"n_head": 4}}, tmp_path / "ckpt.pt")
    options = ("--out", tmp_path / "model", "--tokenizer", saved_llama)
    result = gossamer_command("import", tmp_path / "ckpt.pt", *options)
    assert result.returncode == 0, result.stderr
    assert "gate bias" in result.stdout
    ids = torch.arange(3, 12)[None]
    wanted = gossamer.add_gates(model)(input_ids=ids).logits
    assert torch.equal(gossamer.load(tmp_path / "model")(input_ids=ids).logits, wanted)
    assert (tmp_path / "model" / "tokenizer.json").exists()
    assert_refused(gossamer_command("import", tmp_path / "ckpt.pt", *options), "exists already")
    del tensors["transformer.h.1.ln_2.bias"]
    torch.save(tensors, tmp_path / "cut.pt")
    options = ("--out", tmp_path / "none", "--heads", 4)
    assert_refused(gossamer_command("import", tmp_path / "cut.pt", *options), "cut.pt", "transformer.h.1.ln_2.bias")
    result = gossamer_command("import", tmp_path / "ckpt.pt", "--out", tmp_path / "none", "--tokenizer", tmp_path)
    assert_refused(result, "no tokenizer")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt.pt", "cut.pt", "model"]
