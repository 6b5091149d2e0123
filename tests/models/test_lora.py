"""Adapters: the maps they are added to, the dense model below them, and the model after merging."""

import warnings

import pytest
import torch
from transformers import PreTrainedModel

import gossamer
from families import CONFIGS, tiny_model, tokens
from gossamer import GossamerError
from gossamer.models.architectures import architecture_of
from gossamer.models.lora import adapter_targets, add_adapters, has_adapters, merge_adapters
from gossamer.training.trainer import no_dropout

IDS = tokens(2, 14)


def adapted(name: str = "llama", *, seed: int = 0, targets: tuple[str, ...] = ()) -> PreTrainedModel:
    """Create a tiny gated model whose adapters and gates have random values, as if trained."""
    model = gossamer.add_gates(tiny_model(name))
    add_adapters(model, rank=2, alpha=4.0, targets=targets)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key or key.endswith("gate_bias"):
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def adapted_maps(model: PreTrainedModel) -> set[str]:
    """Get the paths of maps with adapters within a layer; check that all layers have the same."""
    layers = architecture_of(model).layers
    found = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if "lora_A" in name}
    counted = {name.removeprefix(f"{layers}.").partition(".")[::2] for name in found}
    paths = {path for _, path in counted}
    assert counted == {(str(layer), path) for layer in range(3) for path in paths}
    return paths


@pytest.mark.parametrize("name", CONFIGS)
def test_adapters_go_on_the_attention_and_nothing_else(name: str) -> None:
    model = gossamer.add_gates(tiny_model(name))
    architecture = architecture_of(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        add_adapters(model, rank=2, alpha=4.0)
    assert adapted_maps(model) == {f"{architecture.attention}.{part}" for part in architecture.projections}
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {key for key, _ in model.named_parameters() if "lora_" in key or "gate_bias" in key}


@pytest.mark.parametrize(
    "family,names,paths",
    [
        ("llama", ("q_proj", "v_proj", "q_proj"), {"self_attn.q_proj", "self_attn.v_proj"}),
        ("llama", ("k_proj", "mlp.up_proj"), {"self_attn.k_proj", "mlp.up_proj"}),
        ("gpt2", ("c_proj",), {"attn.c_proj", "mlp.c_proj"}),
        ("gpt2", ("attn.c_proj",), {"attn.c_proj"}),
        ("opt", ("fc1",), {"fc1"}),
        ("gpt_neox", ("dense",), {"attention.dense"}),
    ],
)
def test_names_stand_for_the_maps_whose_path_ends_so(family: str, names: tuple[str, ...], paths: set[str]) -> None:
    model = tiny_model(family)
    add_adapters(model, rank=2, alpha=4.0, targets=names)
    assert adapted_maps(model) == paths


@pytest.mark.parametrize("name", ["q_prj", "lm_head", "embed_tokens", "mlp", "proj", "input_layernorm", ""])
def test_a_name_that_is_no_linear_map_of_a_layer_is_refused_in_one_line(name: str) -> None:
    model = tiny_model("llama")
    before = set(model.state_dict())
    with pytest.raises(GossamerError, match=f"llama model has a linear map '{name}'") as error:
        add_adapters(model, rank=2, alpha=4.0, targets=("q_proj", name))
    assert "self_attn.q_proj, self_attn.k_proj" in str(error.value)
    assert "\n" not in str(error.value)
    assert set(model.state_dict()) == before
    assert not has_adapters(model)
    with pytest.raises(GossamerError, match="linear map"):
        adapter_targets(model, (name,))


@torch.no_grad()
def test_new_adapters_change_nothing_and_depend_on_the_seed_alone() -> None:
    wanted = tiny_model("llama")(input_ids=IDS).logits
    starts = []
    for seed in (0, 0, 1):
        model = tiny_model("llama")
        state = torch.get_rng_state()
        add_adapters(model, rank=2, alpha=4.0, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(len(starts))
        assert torch.equal(model(input_ids=IDS).logits, wanted)
        starts.append(torch.cat([p.flatten() for n, p in model.named_parameters() if "lora_A" in n]))
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_merged_adapters_compute_the_same_and_leave_a_plain_gated_model(name: str) -> None:
    model = adapted(name)
    wanted = model(input_ids=IDS).logits
    merge_adapters(model)
    torch.testing.assert_close(model(input_ids=IDS).logits, wanted, rtol=1e-3, atol=1e-3)
    assert set(model.state_dict()) == set(gossamer.add_gates(tiny_model(name)).state_dict())
    assert not has_adapters(model)
    with pytest.raises(GossamerError, match="no adapters to merge"):
        merge_adapters(model)


def test_a_second_set_of_adapters_is_refused() -> None:
    with pytest.raises(GossamerError, match="has adapters already"):
        add_adapters(adapted(), rank=2, alpha=4.0)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_as_dense_is_the_dense_model_bit_for_bit(name: str, bf16: bool, implementation: str) -> None:
    dense = tiny_model(name)
    if implementation == "sdpa" and not dense._supports_sdpa:
        pytest.skip("transformers has no sdpa for it")
    dense.set_attn_implementation(implementation)
    model = gossamer.add_gates(dense)
    add_adapters(model, rank=2, alpha=4.0)
    for key, parameter in model.named_parameters():
        if "lora_B" in key or key.endswith("gate_bias"):
            parameter.fill_(0.3)
    model.train()
    padded = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS).index_fill_(1, torch.tensor([0, 1]), 0)}
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        for batch in ({"input_ids": IDS}, padded):
            with no_dropout(model):
                sparse = model(**batch).logits
            with gossamer.as_dense(model) as within:
                assert within is model
                assert not gossamer.is_gated(model)
                assert not model.training
                assert torch.equal(model(**batch).logits, dense(**batch).logits)
            with no_dropout(model):
                assert torch.equal(model(**batch).logits, sparse)
            assert not torch.allclose(sparse, dense(**batch).logits, atol=0.05)


def settings(model: PreTrainedModel) -> list:
    """Collect everything that as_dense changes temporarily."""
    return [
        model.config._attn_implementation,
        [module.training for module in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
        [module.disable_adapters for module in model.modules() if hasattr(module, "disable_adapters")],
    ]


def test_as_dense_restores_what_was_there_after_an_error_and_when_nested() -> None:
    model = adapted()
    model.train()
    model.model.layers[1].eval()
    model.model.layers[0].self_attn.q_proj.lora_A.requires_grad_(False)
    before, logits = settings(model), model(input_ids=IDS).logits
    with gossamer.as_dense(model):
        with gossamer.as_dense(model):
            pass
        assert not gossamer.is_gated(model)
    assert settings(model) == before
    with pytest.raises(RuntimeError, match="stop"), gossamer.as_dense(model):
        raise RuntimeError("stop")
    assert settings(model) == before
    assert torch.equal(model(input_ids=IDS).logits, logits)
    with pytest.raises(GossamerError, match="no gates"), gossamer.as_dense(tiny_model("llama")):
        pass
    never_begun = adapted()
    before = settings(never_begun)

    def fails(enabled: bool) -> None:
        if not enabled:
            raise RuntimeError("no")

    never_begun.model.layers[2].self_attn.v_proj.enable_adapters = fails
    with pytest.raises(RuntimeError, match="no"), gossamer.as_dense(never_begun):
        pass
    assert settings(never_begun) == before


def test_gradients_pass_through_a_forward_pass_before_as_dense() -> None:
    """as_dense makes peft turn requires_grad off and on between a forward pass and its backward pass."""
    grads = []
    for between in (False, True):
        model = adapted()
        loss = model(input_ids=IDS).logits.square().mean()
        if between:
            with gossamer.as_dense(model), torch.no_grad():
                model(input_ids=IDS)
        loss.backward()
        grads.append({key: p.grad for key, p in model.named_parameters() if "lora_" in key})
    assert all(grad.abs().max() > 0 for grad in grads[0].values())
    assert all(torch.equal(grads[0][key], grads[1][key]) for key in grads[0])


def test_save_refuses_adapters_that_are_not_merged(tmp_path) -> None:
    with pytest.raises(GossamerError, match="save_adapter"):
        gossamer.save(adapted(), tmp_path / "model")
    assert not list(tmp_path.iterdir())
