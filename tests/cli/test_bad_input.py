"""Bad input ends with a one-line message and exit code 2, and leaves no files."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertLMHeadModel, T5Config, T5ForConditionalGeneration

import gossamer
from command_line import assert_refused, gossamer_command, quick
from families import tiny_model


def bad_models(folder: Path) -> None:
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 97}
    BertLMHeadModel(BertConfig(intermediate_size=32, **small)).save_pretrained(folder / "bert")
    T5ForConditionalGeneration(
        T5Config(d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4, vocab_size=97)
    ).save_pretrained(folder / "t5")
    (folder / "hollow").mkdir()


BAD_INPUT = {
    "no such model": (["nobody/nothing"], ["no model 'nobody/nothing'"]),
    "directory without a model": (["{folder}/hollow"], ["without config.json"]),
    "unsupported family": (["{folder}/bert"], ["bert", "decoders only"]),
    "encoder-decoder": (["{folder}/t5"], ["t5", "not a causal language model"]),
    "no such text": (["{model}", "--text", "missing.txt"], ["missing.txt", "no such file"]),
    "empty text": (["{model}", "--text", "{folder}/empty.txt"], ["empty.txt", "is empty"]),
    "short text": (["{model}", "--text", "{folder}/short.txt"], ["short.txt", "shorter than one block of 16"]),
    "over the context": (["{model}", "--seq-len", "65"], ["--seq-len 65", "context of 64"]),
    "no length": (["{model}", "--seq-len", "1"], ["--seq-len 1", "from 2 to"]),
    "unwritable": (["{model}", "--out", "{folder}/empty.txt/run"], ["cannot write", "empty.txt/run"]),
    "read-only": (["{model}", "--out", "/proc/gossamer/run"], ["cannot write", "/proc/gossamer/run"]),
    "unknown watcher": (["{model}", "--report-to", "tensorbord"], ["--report-to tensorbord", "tensorboard, wandb"]),
    "nothing to hold": (["{model}", "--constraint", "kl", "--epsilon", "0"], ["--epsilon 0", "no KL is below 0"]),
    "no number": (["{model}", "--tau", "nan"], ["--tau nan", "finite"]),
    "no tokens": (["{model}", "--tokens", "0"], ["--tokens 0 cannot be used", "from 1 to"]),
    "no such constraint": (["{model}", "--constraint", "kll"], ["--constraint kll", "one of ce, kl"]),
    "of another constraint": (
        ["{model}", "--epsilon", "0.1"],
        ["--epsilon is a setting of the constraint kl"],
    ),
    "cut-off weights": (["{folder}/cut"], ["{folder}/cut", "cut short"]),
    "lost weights": (["{folder}/lossy"], ["{folder}/lossy", "is not whole: it lacks model.layers.1"]),
    "gated already": (["{folder}/gated"], ["gated", "give the dense model"]),
}


@pytest.fixture(scope="module")
def bad_folder(saved_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    bad_models(folder)
    (folder / "empty.txt").touch()
    (folder / "short.txt").write_text("one two")
    gossamer.save(gossamer.add_gates(tiny_model("llama")), folder / "gated")
    for name in ("cut", "lossy"):
        shutil.copytree(saved_llama, folder / name)
    file = folder / "cut" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    file = folder / "lossy" / "model.safetensors"
    kept = {name: value for name, value in load_file(file).items() if "layers.1." not in name}
    save_file(kept, file, {"format": "pt"})
    return folder


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_ends_in_one_line_and_leaves_nothing(
    case: str, bad_folder: Path, saved_llama: Path, text: Path, tmp_path: Path
) -> None:
    arguments, words = BAD_INPUT[case]
    filled = [word.format(folder=bad_folder, model=saved_llama) for word in arguments]
    defaults = {"--text": text, "--out": tmp_path / "run", "--seq-len": 16}
    for flag, value in defaults.items():
        filled += [] if flag in filled else [flag, str(value)]
    before = sorted(bad_folder.rglob("*"))
    assert_refused(gossamer_command("sparsify", *filled), *(word.format(folder=bad_folder) for word in words))
    assert not list(tmp_path.iterdir())
    assert sorted(bad_folder.rglob("*")) == before


@pytest.mark.parametrize("verb", ["evaluate", "inspect"])
def test_what_is_no_run_is_named(verb: str, tmp_path: Path) -> None:
    assert_refused(gossamer_command(verb, tmp_path), str(tmp_path))


def test_faults_of_a_stream_are_one_line(saved_llama: Path, folder_of_text: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text((folder_of_text / "0.jsonl").read_text() + "{broken\n")
    short = tmp_path / "short.jsonl"
    short.write_text('{"text": "the model"}\n')
    for text, words in ((broken, ["line 135", "not valid JSON"]), (short, ["short.jsonl"]), ("self", ["--stream"])):
        out = tmp_path / "out"
        line = ["sparsify", saved_llama, "--text", text, *quick(), "--stream", "--tokens", 200 * 64, "--out", out]
        assert_refused(gossamer_command(*line), *words)


def test_what_is_not_given_or_cannot_be_read_is_named_in_one_line(tmp_path: Path, command_here) -> None:
    out = ("--out", tmp_path / "none")
    for arguments, words in (
        (("sparsify", "smollm2"), "--text is not given"),
        (("sparsify", "--text", "self"), "MODEL is not given"),
        (("sparsify", "--config", tmp_path / "no.yaml"), "no.yaml cannot be read"),
        (("sparsify", "smollm2", "--text", "self", "--tokens", "many"), "--tokens many cannot be used; give a whole"),
    ):
        code, _, errors = command_here(*arguments, *out)
        assert code == 2
        assert len(errors.splitlines()) == 1
        assert words in errors
    assert not (tmp_path / "none").exists()
