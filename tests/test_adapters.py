"""Adapters of peft beside a graft: after it on what no kernel took over, never in silence on what one did."""

import pytest
import torch

import kernelgraft
import twins
from kernelgraft.errors import GraftError, PlanError
from twins import assert_same_state, pair, run

pytestmark = [
    pytest.mark.transformers,
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),  # peft reads it
]
peft = pytest.importorskip("peft")
tiny = pytest.importorskip("tiny")


def lora(*targets, **options):
    targets = "all-linear" if targets == ("all-linear",) else list(targets)
    return peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False, **options)


def adapted(model, *targets, seed=5):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return peft.get_peft_model(model, lora(*targets))


@pytest.mark.parametrize("targets", [["gate_proj"], ["q_proj", "gate_proj"], ["down_proj"], ["up_proj", "v_proj"]])
def test_a_target_that_a_kernel_took_over_is_an_error_that_names_the_place(targets):
    _, model, _ = pair("qwen3")
    name = next(name for name in targets if name in ("gate_proj", "up_proj", "down_proj"))
    with pytest.raises((GraftError, ValueError)) as error:
        adapted(model, *targets)
    text = str(error.value)
    assert "absorbed by model.layers.0.post_attention_layernorm" in text or (
        "would replace" in text and f"{name!r}" in text and "model.layers.0" in text
    )


def test_every_linear_is_an_error_that_names_the_place():
    _, model, _ = pair("qwen3")
    with pytest.raises(GraftError, match=r"would replace 'gate_up_proj'.*model\.layers\.0\.post_attention_layernorm"):
        adapted(model, "all-linear")


def test_what_no_kernel_took_over_is_adapted_trained_saved_loaded_and_merged(tmp_path):
    twin, model, graft = pair("qwen3")
    base = twins.untouched("qwen3").state_dict()
    adapters = [adapted(each, "q_proj", "o_proj") for each in (model, twin)]
    assert torch.equal(run("qwen3", adapters[0]), run("qwen3", adapters[1]))
    assert_same_state(adapters[0].state_dict(), adapters[1].state_dict())
    assert not torch.equal(run("qwen3", model), run("qwen3", twins.untouched("qwen3")))
    for each in adapters:
        optimizer = torch.optim.SGD([p for p in each.parameters() if p.requires_grad], lr=0.1)
        run("qwen3", each).pow(2).mean().backward()
        optimizer.step()
    torch.testing.assert_close(dict(adapters[0].state_dict()), dict(adapters[1].state_dict()))

    adapters[0].save_pretrained(tmp_path)
    _, other, _ = pair("qwen3")
    for base_model in (other, twins.untouched("qwen3")):
        again = peft.PeftModel.from_pretrained(base_model, tmp_path)
        assert torch.equal(run("qwen3", again), run("qwen3", adapters[0]))

    merged = adapters[0].merge_and_unload()
    assert merged is model
    assert graft.is_applied
    expected = adapters[1].merge_and_unload()
    torch.testing.assert_close(dict(merged.state_dict()), dict(expected.state_dict()))
    changed = [name for name, tensor in merged.state_dict().items() if not torch.equal(tensor, base[name])]
    assert {name.split(".")[-2] for name in changed} == {"q_proj", "o_proj"}
    graft.remove()
    torch.testing.assert_close(run("qwen3", merged), run("qwen3", expected))


def test_adapted_and_unloaded_a_graft_is_removed_to_the_weights_of_before():
    twin, model, graft = pair("qwen3")
    adapter = adapted(model, "q_proj")
    assert not any(p.requires_grad for name, p in adapter.named_parameters() if "lora" not in name)
    assert adapter.unload() is model
    graft.remove()
    model.requires_grad_(True)
    assert_same_state(model.state_dict(), twin.state_dict())


def test_a_graft_can_be_removed_below_an_adapter():
    twin, model, graft = pair("qwen3")
    adapters = [adapted(each, "q_proj") for each in (model, twin)]
    graft.remove()
    assert torch.equal(run("qwen3", adapters[0]), run("qwen3", adapters[1]))
    assert_same_state(adapters[0].state_dict(), adapters[1].state_dict())


@pytest.mark.parametrize("target", ["gate_proj", "up_proj", "down_proj"])
def test_an_adapter_that_was_there_first_on_what_a_kernel_would_take_over_is_refused(target):
    model = twins.untouched("qwen3")
    adapter = adapted(model, target)
    before = run("qwen3", adapter)
    state = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
    with pytest.raises(PlanError, match=rf"model\.layers\.0\.mlp\.{target}' is adapted .*merge_and_unload"):
        kernelgraft.graft(model, tiny.guide_config())
    assert torch.equal(run("qwen3", adapter), before)
    twins.assert_same_tensors(adapter.state_dict(), state)
    merged = adapter.merge_and_unload()
    with kernelgraft.graft(merged, tiny.guide_config()) as graft:
        torch.testing.assert_close(run("qwen3", merged), before)
        assert graft.calls.kernel > 0


def test_an_adapter_that_was_there_first_on_what_no_kernel_takes_over_stays():
    model = twins.untouched("qwen3")
    adapter = adapted(model, "q_proj")
    before = run("qwen3", adapter)
    state = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
    adapter.requires_grad_(True)
    with kernelgraft.graft(model, tiny.guide_config()) as graft:
        assert torch.equal(run("qwen3", adapter), before)
        assert graft.calls.kernel > 0
        twins.assert_same_tensors(adapter.state_dict(), state)
    twins.assert_same_tensors(adapter.state_dict(), state)
