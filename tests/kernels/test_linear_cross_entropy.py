"""The head whose logits wait, in models of Transformers with their own loss."""

import copy
import pickle

import pytest
import torch
from drawn import DEVICE
from test_cross_entropy import Largest
from test_lazy_logits import is_read, logits_of, through

import kernelgraft
from kernelgraft.kernels import cross_entropy
from kernelgraft.kernels.lazy_logits import LazyLogits

CAP = {"final_logit_softcapping": 5.0}
MODELS = {
    "llama": {},
    "qwen3": {"tie_word_embeddings": True},
    "gemma2": CAP,
    "gemma3": CAP,
    "cohere": {"logit_scale": 0.5},
    "granite": {"logits_scaling": 4.0},
    "bert": {},
}
AT = {"bert": "cls.predictions.decoder"}


@pytest.fixture
def kinds(monkeypatch):
    import tiny

    more = {**tiny.DECODER, "head_dim": 8, "sliding_window": 16}
    monkeypatch.setitem(tiny.KINDS, "gemma2", ("Gemma2ForCausalLM", more))
    monkeypatch.setitem(tiny.KINDS, "granite", ("GraniteForCausalLM", tiny.DECODER))
    return tiny


def grafted(model, kind="llama", **options):
    key = ("Linear", AT.get(kind, "lm_head"))
    return kernelgraft.graft(model, {key: "kernelgraft.kernels:LinearCrossEntropy"}, **options)


def batch_of(tiny, kind, batch=5, length=20):
    given = tiny.inputs(kind, batch=batch, length=length)
    labels = given["input_ids"].clone()
    labels[0] = -100
    labels[:, :3] = -100
    return {**given, "labels": labels}


def gradients(model, loss):
    parameters = dict(model.named_parameters())
    return dict(zip(parameters, torch.autograd.grad(loss, parameters.values(), allow_unused=True), strict=True))


def assert_same_step(model, other, given, **close):
    out, wanted = model(**given), other(**given)
    assert type(out.logits) is LazyLogits
    torch.testing.assert_close(out.loss, wanted.loss, **close)
    assert not is_read(out.logits)
    found, exact = gradients(model, out.loss), gradients(other, wanted.loss)
    for name, grad in exact.items():
        if grad is None:
            assert found[name] is None
        else:
            scale = grad.abs().max().item()
            torch.testing.assert_close(found[name], grad, **{**close, "atol": close["atol"] * max(scale, 1e-3)})
    assert torch.equal(logits_of(out.logits), wanted.logits)
    return out


@pytest.mark.transformers
@pytest.mark.parametrize("in_triton", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_the_models_own_loss(kinds, monkeypatch, kind, in_triton):
    monkeypatch.setattr(cross_entropy, "BUFFER", 8 * 64 * 4 * 30)
    monkeypatch.setattr(cross_entropy.device, "in_triton", lambda x: in_triton)
    model, other = (kinds.model(kind, **MODELS[kind]).to(DEVICE) for _ in range(2))
    given = {name: each.to(DEVICE) for name, each in batch_of(kinds, kind).items()}
    with grafted(model, kind) as graft:
        assert_same_step(model, other, given, rtol=1e-4, atol=1e-5)
        more = {"num_items_in_batch": torch.tensor(123)} if kind != "bert" else {}
        assert_same_step(model, other, {**given, **more}, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            torch.testing.assert_close(model(**given).loss, other(**given).loss)
        with torch.inference_mode():
            torch.testing.assert_close(model(**given).loss, other(**given).loss)
        assert graft.calls.kernel == 4
        assert graft.calls.reference == 0
    assert torch.equal(model(**given).loss, other(**given).loss)


@pytest.mark.transformers
def test_labels_that_the_caller_has_shifted(kinds):
    model, other = kinds.model("llama").to(DEVICE), kinds.model("llama").to(DEVICE)
    given = {name: each.to(DEVICE) for name, each in batch_of(kinds, "llama").items()}
    plain = other(**given).loss
    given["shift_labels"] = given["labels"].roll(-2, 1)
    with grafted(model) as graft:
        out = assert_same_step(model, other, given, rtol=1e-4, atol=1e-5)
        assert graft.calls.kernel == 1
    assert (out.loss - plain).abs() > 1e-3


@pytest.mark.transformers
@pytest.mark.parametrize("kind", ["llama", "gemma2", "cohere"])
def test_the_models_own_loss_in_bfloat16(kinds, kind):
    model, other = (kinds.model(kind, **MODELS[kind]).bfloat16() for _ in range(2))
    with grafted(model, kind):
        assert_same_step(model, other, batch_of(kinds, kind), rtol=3e-2, atol=3e-2)


@pytest.mark.transformers
def test_trained_as_a_trainer_does(kinds):
    """Steps with gradients accumulated, clipped and applied, under a tied head, and what is reported beside them."""
    import transformers

    models = [kinds.model("qwen3", tie_word_embeddings=True).train() for _ in range(2)]
    losses, reported = ([], []), ([], [])
    with grafted(models[0]) as graft:
        assert models[0].lm_head.weight is models[0].model.embed_tokens.weight
        for model, found, seen in zip(models, losses, reported, strict=True):
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
            for step in range(3):
                for part in range(2):
                    given = {**batch_of(kinds, "qwen3"), "num_items_in_batch": torch.tensor(150)}
                    given["input_ids"] = given["input_ids"].roll(step + 3 * part, 0)
                    out = model(**given)
                    (out.loss / 2).backward()
                    found.append(out.loss.detach())
                    seen.append(transformers.trainer_pt_utils.nested_detach(out.logits).argmax(-1))
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        assert graft.calls.kernel == 6
    torch.testing.assert_close(*(torch.stack(each) for each in losses), rtol=1e-4, atol=1e-4)
    assert losses[0][-1] < losses[0][0]
    assert all(torch.equal(one, other) for one, other in zip(*reported, strict=True))


@pytest.mark.transformers
def test_outputs_in_the_hands_of_others(kinds, tmp_path):
    model, other = kinds.model("llama"), kinds.model("llama")
    given = batch_of(kinds, "llama")
    with grafted(model), torch.no_grad():
        wanted = other(**given).logits
        for use in (
            lambda out: out.logits,
            lambda out: out[1],
            lambda out: out.to_tuple()[1],
            lambda out: copy.deepcopy(out).logits,
            lambda out: pickle.loads(pickle.dumps(out)).logits,
            lambda out: through(torch.save, lambda file: torch.load(file, weights_only=False), out).logits,
            lambda out: torch.utils._pytree.tree_map_only(torch.Tensor, lambda each: each.cpu(), out).logits,
        ):
            assert torch.equal(logits_of(use(model(**given))), wanted)


@pytest.mark.transformers
def test_generation(kinds):
    model, other = kinds.model("qwen3"), kinds.model("qwen3")
    with grafted(model) as graft:
        assert torch.equal(kinds.generate(model), kinds.generate(other))
        prompt = kinds.inputs("qwen3", batch=70, length=4)["input_ids"]  # more rows than are computed at once
        given = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 3, "do_sample": False}
        assert torch.equal(model.generate(prompt, **given), other.generate(prompt, **given))
        assert graft.calls.kernel > 0


@pytest.mark.transformers
def test_the_logits_of_a_model_are_never_there_together(kinds, monkeypatch):
    vocabulary = 3000
    monkeypatch.setattr(cross_entropy, "BUFFER", 8 * vocabulary * 4 * 20)
    model, other = (kinds.model("llama", vocab_size=vocabulary) for _ in range(2))
    given, logits = batch_of(kinds, "llama"), 100 * vocabulary
    with grafted(model):
        for learns in (True, False):
            for each, there in ((model, False), (other, True)):
                with Largest() as largest, torch.set_grad_enabled(learns):
                    loss = each(**given).loss
                    if learns:
                        loss.backward()
                assert (largest.numel >= logits) == there


@pytest.mark.transformers
def test_loaded_with_the_kernel(kinds, checkpoint, tmp_path):
    folder = checkpoint("qwen3", tie_word_embeddings=True)
    config = kernelgraft.KernelConfig({("Linear", "lm_head"): "kernelgraft.kernels:LinearCrossEntropy"})
    model = kernelgraft.AutoModelForCausalLM.from_pretrained(folder, kernel_config=config)
    other = kinds.transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_same_step(model, other, batch_of(kinds, "qwen3"), rtol=1e-4, atol=1e-5)
    assert model.state_dict().keys() == other.state_dict().keys()
    model.save_pretrained(tmp_path)
    again = kernelgraft.AutoModelForCausalLM.from_pretrained(tmp_path, kernel_config="recorded")
    assert type(again(**batch_of(kinds, "qwen3")).logits) is LazyLogits


@pytest.mark.transformers
def test_verified(kinds):
    with grafted(kinds.model("gemma3", **CAP).to(DEVICE)) as graft:
        graft.verify(every_site=False).raise_for_failures()
