"""Gates in every family: open gates change nothing, closed gates silence attention, refusals name the model."""

from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from family_table import tiny_model as any_tiny_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    BertModel,
    PreTrainedModel,
    T5Config,
)

import gossamer
from families import CONFIGS, tiny_config, tiny_model, tokens
from gossamer import GossamerError
from gossamer.models.architectures import PROVEN, attention_modules
from gossamer.models.lora import add_adapters


def padded(side: str, length: int = 14, real: int = 9) -> torch.Tensor:
    mask = torch.ones(2, length, dtype=torch.long)
    if side == "right":
        mask[1, real:] = 0
    elif side == "left":
        mask[1, : length - real] = 0
    return mask


def test_every_tiny_model_is_of_a_family_that_is_proven() -> None:
    assert {model_type for model_type, _ in CONFIGS.values()} <= PROVEN


@torch.no_grad()
@pytest.mark.parametrize("side", ["none", "right", "left"])
@pytest.mark.parametrize("name", CONFIGS)
def test_open_gates_equal_eager_attention(name: str, side: str) -> None:
    dense = tiny_model(name)
    mask = padded(side)
    batch = {"input_ids": tokens(2, 14), "attention_mask": mask}
    gated = gossamer.add_gates(dense)
    with gossamer.forced_open(gated):
        found = gated(**batch).logits
    wanted = dense(**batch).logits
    assert wanted.std() > 0.1
    assert (found - wanted)[mask.bool()].abs().max() < 1e-5 * max(1.0, wanted.abs().max())


@torch.no_grad()
@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", CONFIGS)
def test_open_gates_generate_the_same_with_a_cache(name: str, cache: str, side: str) -> None:
    if name == "opt" and cache == "static":
        pytest.skip("OPT does not support a static cache in transformers")
    dense = tiny_model(name)
    options = {
        "input_ids": tokens(2, 14),
        "attention_mask": padded(side),
        "max_new_tokens": 8,
        "min_new_tokens": 8,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    wanted = dense.generate(**options)
    gated = gossamer.add_gates(dense)
    with gossamer.forced_open(gated):
        found = gated.generate(**options, cache_implementation="static" if cache == "static" else None)
    assert torch.equal(found.sequences, wanted.sequences)
    for a, b in zip(found.logits, wanted.logits, strict=True):
        assert (a - b).abs().max() < 1e-5 * max(1.0, b.abs().max())


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_hard_gates_with_a_cache_equal_those_without(name: str) -> None:
    gated = gossamer.add_gates(tiny_model(name))
    ids = tokens(2, 14)
    whole = gated(input_ids=ids).logits
    first = gated(input_ids=ids[:, :10], use_cache=True)
    rest = gated(input_ids=ids[:, 10:], past_key_values=first.past_key_values, use_cache=True).logits
    torch.testing.assert_close(rest, whole[:, 10:], rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_hard_gates_padded_and_cached_equal_those_alone_and_without_a_cache(name: str) -> None:
    gated = gossamer.add_gates(tiny_model(name))
    alone = tokens(1, 9, seed=3)
    wanted = alone
    for _ in range(6):
        wanted = torch.cat([wanted, gated(input_ids=wanted, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    batch = tokens(2, 14)
    batch[1, 5:] = alone[0]
    mask = padded("left")
    options = {"attention_mask": mask, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    assert torch.equal(gated.generate(batch, **options)[1, 5:], wanted[0])
    right = tokens(2, 14)
    right[1, :9] = alone[0]
    logits = gated(input_ids=alone).logits[0]
    limit = 1e-5 * max(1.0, logits.abs().max())
    for given in (padded("right"), None):  # padding after the real tokens needs no mask
        assert (gated(input_ids=right, attention_mask=given).logits[1, :9] - logits).abs().max() < limit


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_counts_are_those_of_causality_window_and_padding(name: str) -> None:
    gated = gossamer.add_gates(tiny_model(name))
    mask = padded("left")
    with gossamer.counted_links(gated) as counts, gossamer.forced_open(gated):
        gated(input_ids=tokens(2, 14), attention_mask=mask)
    assert sorted(counts) == [0, 1, 2]
    for layer, module in enumerate(attention_modules(gated)):
        window = getattr(module, "sliding_window", None) or getattr(gated.config, "sliding_window", None)
        if name in ("gpt2", "llama") or (hasattr(module, "sliding_window") and module.sliding_window is None):
            window = None
        span = window or 14
        expected = [sum(min(i + 1, span) for i in range(real)) for real in (14, 9)]
        assert counts[layer].allowed_links[:, 0].sum(-1).tolist() == expected
        assert torch.equal(counts[layer].open_links, counts[layer].allowed_links)


@torch.no_grad()
def test_gates_do_something_and_closed_ones_silence_attention() -> None:
    dense = tiny_model("llama")
    batch = {"input_ids": tokens(1, 12)}
    half = gossamer.add_gates(dense)
    with gossamer.counted_links(half) as counts:
        assert not torch.allclose(half(**batch).logits, dense(**batch).logits, atol=1e-3)
    assert 0 < counts[0].open_links.sum() < counts[0].allowed_links.sum()
    closed = gossamer.add_gates(dense, gate_bias=-1e4)
    for module in attention_modules(dense):
        module.o_proj.weight.zero_()
    torch.testing.assert_close(closed(**batch).logits, dense(**batch).logits)


@torch.no_grad()
def test_sampled_gates_follow_the_seed_and_end_with_their_context() -> None:
    gated = gossamer.add_gates(tiny_model("llama")).train()
    batch = {"input_ids": tokens(1, 12)}
    hard = gated(**batch).logits
    with gossamer.sampled_gates(gated, seed=1):
        first, again = gated(**batch).logits, gated(**batch).logits
    with gossamer.sampled_gates(gated, seed=2):
        other = gated(**batch).logits
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    assert torch.equal(gated(**batch).logits, hard)


@torch.no_grad()
def test_contexts_restore_after_an_error() -> None:
    gated = gossamer.add_gates(tiny_model("llama"))
    before = gated(input_ids=tokens(1, 5)).logits
    with pytest.raises(RuntimeError, match="stop"), gossamer.forced_open(gated):
        raise RuntimeError("stop")
    assert torch.equal(gated(input_ids=tokens(1, 5)).logits, before)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_remove_gates_takes_the_gates_off(name: str) -> None:
    dense = tiny_model(name)
    gated = gossamer.add_gates(dense)
    back = gossamer.remove_gates(gated)
    batch = {"input_ids": tokens(1, 12)}
    assert not gossamer.is_gated(back)
    assert gossamer.is_gated(gated)
    assert set(back.state_dict()) == set(dense.state_dict())
    torch.testing.assert_close(back(**batch).logits, dense(**batch).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_add_gates_leaves_the_original_alone_unless_told() -> None:
    dense = tiny_model("llama")
    before = dense(input_ids=tokens(1, 5)).logits
    gossamer.add_gates(dense)
    assert torch.equal(dense(input_ids=tokens(1, 5)).logits, before)
    assert gossamer.add_gates(dense, inplace=True) is dense


def test_gradients_reach_bias_and_projections_with_activation_checkpointing_alike() -> None:
    plain = gossamer.add_gates(tiny_model("llama")).train()
    recomputed = gossamer.add_gates(tiny_model("llama")).train()
    recomputed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    grads = []
    for model in (plain, recomputed):
        with gossamer.sampled_gates(model, seed=3), gossamer.counted_links(model) as counts:
            loss = model(input_ids=tokens(2, 9), use_cache=False).logits.square().mean()
            (loss + sum(count.expected_open.sum() for count in counts.values())).backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert all(grad is not None and grad.abs().max() > 0 for name, grad in grads[0].items() if "gate_bias" in name)
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad)


REFUSED = {
    "gpt_neo": "gpt_neo does not call",
    "bloom": "bloom does not call",
    "falcon": "falcon does not call",
    "gpt_oss": "gpt_oss has attention sinks",
    "deepseek_v32": "an indexer in the attention of deepseek_v32 chooses keys",
    "qwen3_next": "some layers of qwen3_next have no attention",
    "falcon_h1": "the layers of falcon_h1 mix tokens by a convolution",
    "longcat_flash": "a layer of longcat_flash has 2 attention modules",
    "bart": "the layers of bart attend to an encoder too",
    "beam": "gate_bias of its own",
    "diffllama": "attention of diffllama is made of several",
    "doge": "doge does not run with gates|additive biases",
    "bert": "bert is an encoder",
}


@pytest.mark.parametrize("family", REFUSED)
def test_what_cannot_be_gated_is_refused_by_name_and_left_alone(family: str) -> None:
    refused_and_left_alone(any_tiny_model(family), REFUSED[family])


def test_settings_that_cannot_be_gated_are_refused() -> None:
    refused_and_left_alone(any_tiny_model("gpt2", add_cross_attention=True), "attend to an encoder")
    refused_and_left_alone(any_tiny_model("gemma3_text", use_bidirectional_attention=True), "use_bidirectional")


def refused_and_left_alone(model: PreTrainedModel, message: str) -> None:
    before = (set(model.state_dict()), model.config._attn_implementation)
    with pytest.raises(GossamerError, match=message):
        gossamer.add_gates(model, inplace=True)
    assert before == (set(model.state_dict()), model.config._attn_implementation)
    assert not gossamer.is_gated(model)


def test_encoders_and_encoder_decoders_are_refused() -> None:
    bert = BertModel(
        BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32, vocab_size=97)
    )
    with pytest.raises(GossamerError, match="BertModel is not the causal language model of bert"):
        gossamer.add_gates(bert)
    t5 = AutoModelForSeq2SeqLM.from_config(
        T5Config(d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4, vocab_size=97)
    )
    with pytest.raises(GossamerError, match="encoder-decoder"):
        gossamer.add_gates(t5)


def test_gating_twice_and_degating_a_dense_model_are_refused() -> None:
    gated = gossamer.add_gates(tiny_model("llama"))
    with pytest.raises(GossamerError, match="has gates already"):
        gossamer.add_gates(gated)
    with pytest.raises(GossamerError, match="no gates"):
        gossamer.remove_gates(tiny_model("llama"))


def test_a_model_with_offloaded_layers_is_refused_before_anything_is_changed(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu",
              "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "cpu"}  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offloaded"
    )
    before = set(model.state_dict())
    with pytest.raises(GossamerError, match=r"model\.layers\.1\..* is offloaded"):
        gossamer.add_gates(model, inplace=True)
    assert set(model.state_dict()) == before
    gossamer.save_adapter(adapted(), tmp_path / "adapter")
    with pytest.raises(GossamerError, match=r"model\.layers\.1\..* is offloaded"):
        gossamer.load_adapter(tmp_path / "adapter", model)
    gated = cpu_offload(gossamer.add_gates(tiny_model("llama")), torch.device("cpu"))
    with pytest.raises(GossamerError, match=r"offloaded.*load it whole"):
        gossamer.save(gated, tmp_path / "gated")
    assert not (tmp_path / "gated").exists()


def adapted() -> PreTrainedModel:
    model = gossamer.add_gates(tiny_model("llama"))
    add_adapters(model, rank=2, alpha=4.0)
    return model


def test_attention_biases_in_a_mask_are_refused() -> None:
    gated = gossamer.add_gates(tiny_model("llama"))
    mask = torch.zeros(1, 1, 6, 6).masked_fill(torch.ones(6, 6).triu(1).bool(), torch.finfo(torch.float32).min)
    ids = tokens(1, 6)
    torch.testing.assert_close(gated(input_ids=ids, attention_mask=mask).logits, gated(input_ids=ids).logits)
    with pytest.raises(GossamerError, match="additive biases"):
        gated(input_ids=ids, attention_mask=mask - 0.5)


def test_tiny_config_is_fresh_each_time() -> None:
    assert tiny_config("llama") is not tiny_config("llama")


@torch.no_grad()
@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "phi3"])
def test_sampled_gates_with_a_cache_are_those_without(name: str, side: str) -> None:
    """This includes caches that have dropped the keys outside of every window."""
    gated = gossamer.add_gates(tiny_model(name))
    ids, mask = tokens(2, 14), padded(side)
    with gossamer.sampled_gates(gated, seed=4):
        whole = gated(input_ids=ids, attention_mask=mask).logits
        cache, found = None, []
        for start, stop in ((0, 9), (9, 10), (10, 14)):
            so_far = None if mask is None else mask[:, :stop]
            out = gated(input_ids=ids[:, start:stop], attention_mask=so_far, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            found.append(out.logits)
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    torch.testing.assert_close(torch.cat(found, 1)[real], whole[real], rtol=1e-4, atol=1e-4)
