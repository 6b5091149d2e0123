"""Checkpoints in the layouts of nanoGPT and TransformerLens, written from transformers' GPT-2, are that GPT-2 again."""

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import gossamer
from families import tokens
from gossamer import GossamerError
from gossamer.models.checkpoint import gate_biases
from gossamer.models.imported import import_checkpoint

HEADS, WIDTH, LAYERS, ROWS = 4, 32, 2, 97


def gpt2(*, tied: bool = True, biased: bool = True) -> GPT2LMHeadModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=ROWS, n_positions=24, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS,
                            tie_word_embeddings=tied)  # fmt: skip
        model = GPT2LMHeadModel(config).eval()
        for name, parameter in model.named_parameters():
            torch.nn.init.normal_(parameter, std=0.3)
            if name.endswith("bias") and not biased:
                torch.nn.init.zeros_(parameter)
    return model


def nanogpt(model: GPT2LMHeadModel, *, biased: bool = True) -> dict[str, Tensor]:
    """Convert to nanoGPT's layout: linear weights are [out, in], and the buffers include a causal mask."""
    found = {}
    for name, tensor in model.state_dict().items():
        linear = any(part in name for part in ("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        if biased or not name.endswith(".bias"):
            found[name] = tensor.T.contiguous() if linear else tensor
    for layer in range(LAYERS):
        found[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 24, 24).tril()
    return found


def transformer_lens(model: GPT2LMHeadModel) -> dict[str, Tensor]:
    """Convert to weights by head, named as in TransformerLens' documentation of HookedTransformer."""
    own, size = model.state_dict(), WIDTH // HEADS
    found = {
        "embed.W_E": own["transformer.wte.weight"],
        "pos_embed.W_pos": own["transformer.wpe.weight"],
        "unembed.W_U": own["lm_head.weight"].T.contiguous(),
        "unembed.b_U": torch.zeros(ROWS),
        "ln_final.w": own["transformer.ln_f.weight"],
        "ln_final.b": own["transformer.ln_f.bias"],
    }
    for layer in range(LAYERS):
        theirs, ours = f"blocks.{layer}", f"transformer.h.{layer}"
        for index, part in enumerate("QKV"):
            columns = slice(index * WIDTH, (index + 1) * WIDTH)
            weight, bias = own[f"{ours}.attn.c_attn.weight"][:, columns], own[f"{ours}.attn.c_attn.bias"][columns]
            found[f"{theirs}.attn.W_{part}"] = torch.stack(
                [weight[:, head * size : (head + 1) * size] for head in range(HEADS)]
            )
            found[f"{theirs}.attn.b_{part}"] = torch.stack([bias[h * size : (h + 1) * size] for h in range(HEADS)])
        output = own[f"{ours}.attn.c_proj.weight"]
        found[f"{theirs}.attn.W_O"] = torch.stack([output[h * size : (h + 1) * size] for h in range(HEADS)])
        found[f"{theirs}.attn.mask"] = torch.ones(24, 24).tril().bool()
        found[f"{theirs}.attn.IGNORE"] = torch.tensor(-torch.inf)
        for a, b in {"attn.b_O": "attn.c_proj.bias", "mlp.W_in": "mlp.c_fc.weight", "mlp.b_in": "mlp.c_fc.bias",
                     "mlp.W_out": "mlp.c_proj.weight", "mlp.b_out": "mlp.c_proj.bias", "ln1.w": "ln_1.weight",
                     "ln1.b": "ln_1.bias", "ln2.w": "ln_2.weight", "ln2.b": "ln_2.bias"}.items():  # fmt: skip
            found[f"{theirs}.{a}"] = own[f"{ours}.{b}"]
    return found


LAYOUTS: dict[str, tuple[Callable[[GPT2LMHeadModel], dict], dict]] = {
    "nanoGPT's training checkpoint": (
        lambda model: {
            "model": {f"_orig_mod.{name}": tensor for name, tensor in nanogpt(model).items()},
            "model_args": {"n_layer": LAYERS, "n_head": HEADS, "n_embd": WIDTH, "bias": True},
            "iter_num": 10,
            "best_val_loss": torch.tensor(3.0),
            "config": {"dataset": "openwebtext"},
        },
        {},
    ),
    "nanoGPT's weights alone": (nanogpt, {"heads": HEADS}),
    "of data parallelism": (
        lambda model: {"state_dict": {f"module._orig_mod.{name}": t for name, t in nanogpt(model).items()}},
        {"heads": HEADS},
    ),
    "TransformerLens": (transformer_lens, {}),
    "TransformerLens in half precision": (
        lambda model: {name: tensor.bfloat16() for name, tensor in transformer_lens(model).items()},
        {},
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_import_says_what_the_model_says_with_gates_at_bias_0(layout: str, tied: bool, tmp_path: Path) -> None:
    model = gpt2(tied=tied)
    if "half" in layout:
        model.bfloat16().float()
    write, options = LAYOUTS[layout]
    torch.save(write(model), tmp_path / "checkpoint.pt")
    found = import_checkpoint(tmp_path / "checkpoint.pt", **options)
    wanted = gossamer.add_gates(model, gate_bias=0.0)
    ids = tokens(2, 20)
    assert gate_biases(found).abs().max() == 0
    assert found.config.tie_word_embeddings == tied
    assert torch.equal(found(input_ids=ids).logits, wanted(input_ids=ids).logits)
    assert not torch.allclose(found(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-2)
    gossamer.save(found, tmp_path / "model")
    assert torch.equal(gossamer.load(tmp_path / "model")(input_ids=ids).logits, wanted(input_ids=ids).logits)


@torch.no_grad()
def test_a_checkpoint_without_biases_has_biases_of_0(tmp_path: Path) -> None:
    model = gpt2(biased=False)
    torch.save(nanogpt(model, biased=False), tmp_path / "checkpoint.pt")
    found = import_checkpoint(tmp_path / "checkpoint.pt", heads=HEADS)
    ids = tokens(2, 20)
    assert torch.equal(found(input_ids=ids).logits, gossamer.add_gates(model)(input_ids=ids).logits)


@torch.no_grad()
def test_padding_rows_of_the_vocabulary_stay_unless_told(tmp_path: Path) -> None:
    model = gpt2()
    torch.save(transformer_lens(model), tmp_path / "checkpoint.pt")
    ids = tokens(2, 20).clamp(max=89)
    whole = import_checkpoint(tmp_path / "checkpoint.pt")
    cut = import_checkpoint(tmp_path / "checkpoint.pt", vocab_size=90)
    assert whole.config.vocab_size == ROWS
    assert cut.config.vocab_size == 90
    assert cut.lm_head.weight is cut.transformer.wte.weight
    torch.testing.assert_close(cut(input_ids=ids).logits, whole(input_ids=ids).logits[..., :90])
    with pytest.raises(GossamerError, match="97 vocabulary rows; 98 of them"):
        import_checkpoint(tmp_path / "checkpoint.pt", vocab_size=98)


@torch.no_grad()
def test_the_activation_that_no_layout_names_can_be_said(tmp_path: Path) -> None:
    torch.save(transformer_lens(gpt2()), tmp_path / "checkpoint.pt")
    exact = import_checkpoint(tmp_path / "checkpoint.pt", activation="gelu")
    assert exact.config.activation_function == "gelu"


def without(tensors: dict, name: str) -> dict:
    return {key: value for key, value in tensors.items() if key != name}


OWN = {"heads": HEADS}
BIAS = "transformer.h.1.mlp.c_fc.bias"
FAULTS: dict[str, tuple[Callable[[GPT2LMHeadModel], object], dict, str]] = {
    "missing": (lambda m: without(transformer_lens(m), "blocks.1.attn.b_K"), {}, "lacks blocks.1.attn.b_K"),
    "folded": (
        lambda m: {name: t for name, t in transformer_lens(m).items() if "ln" not in name},
        {},
        "lacks ln_final.w; .* fold_ln=False",
    ),
    "one bias of many": (lambda m: without(nanogpt(m), BIAS), OWN, f"lacks {BIAS}"),
    "unexpected": (lambda m: {**nanogpt(m), "gates": torch.ones(1)}, OWN, "gates has no place"),
    "transposed": (lambda m: m.state_dict(), OWN, r"h.0.attn.c_attn.weight has shape \[32, 96\], not \[96, 32\]"),
    "layer missing": (
        lambda m: {name: t for name, t in nanogpt(m).items() if ".h.0." not in name},
        OWN,
        r"the layers \[1\]",
    ),
    "heads unknown": (nanogpt, {}, "width of 32; give --heads"),
    "heads that do not fit": (nanogpt, {"heads": 5}, "which 5 heads cannot share"),
    "heads that contradict": (transformer_lens, {"heads": 2}, "has 4 heads by the shape of blocks.0.attn.W_Q, not 2"),
    "unembedding bias": (lambda m: {**transformer_lens(m), "unembed.b_U": torch.ones(ROWS)}, {}, "b_U is not 0"),
    "another layout": (lambda m: {"encoder.weight": torch.ones(2)}, {}, "neither transformer.wte.weight"),
    "no tensor": (lambda m: {"model": {"transformer.wte.weight": 3}}, {}, "transformer.wte.weight is a int"),
    "not a dict": (lambda m: torch.ones(3), {}, "holds a Tensor"),
    "other objects": (lambda m: {"model": Path("x")}, {}, "holds more than tensors"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_what_does_not_fit_is_named(case: str, tmp_path: Path) -> None:
    write, options, words = FAULTS[case]
    torch.save(write(gpt2()), tmp_path / "checkpoint.pt")
    with pytest.raises(GossamerError, match=words):
        import_checkpoint(tmp_path / "checkpoint.pt", **options)


def test_files_that_are_no_checkpoints_are_named(tmp_path: Path) -> None:
    torch.save(transformer_lens(gpt2()), tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    for name, content in {"cut.pt": whole[: len(whole) // 2], "text.pt": b"hello", "empty.pt": b"",
                          "pickle.pt": pickle.dumps({"a": Path("x")})}.items():  # fmt: skip
        (tmp_path / name).write_bytes(content)
        with pytest.raises(GossamerError, match=f"{name} cannot be used: it .* torch.save wrote"):
            import_checkpoint(tmp_path / name)
    with pytest.raises(GossamerError, match="No such file"):
        import_checkpoint(tmp_path / "missing.pt")
