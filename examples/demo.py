"""kernelgraft in two minutes: two kernels put into a real language model, proved, saved, and taken out again."""

import tempfile
from pathlib import Path

import smollm2
import torch
import transformers
from safetensors.torch import load_file

import kernelgraft
from kernelgraft import AutoModelForCausalLM, KernelConfig

REPOSITORY = Path(__file__).parent / "my-kernel"
QUESTION = "What is the capital of France?"

KERNELS = KernelConfig(
    {
        (
            ("RMSNorm", "model.layers.*.post_attention_layernorm"),
            ("MLP", "model.layers.*.mlp"),
        ): f"{REPOSITORY}:RMSNormMLP",
        "RMSNorm": f"{REPOSITORY}:CustomRMSNorm",
    }
)


def title(text: str) -> None:
    print(f"\n== {text}")


def main() -> None:
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, on CPU")

    title("The model: SmolLM2-135M-Instruct, from the Python package index")
    folder = smollm2.folder()
    print(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder)

    title("The same model with two kernels in it")
    model = AutoModelForCausalLM.from_pretrained(folder, use_kernels=True, kernel_config=KERNELS)
    graft = kernelgraft.graft_of(model)
    print(graft.plan)

    title("A question to both")
    chat = [{"role": "user", "content": QUESTION}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answers = []
    for name, each in (("plain", plain), ("kernels", model)):
        tokens = each.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        answers.append(tokens)
        print(f"{name:>8}: {tokenizer.decode(tokens, skip_special_tokens=True)}")
    with torch.no_grad():
        difference = (model(**inputs).logits - plain(**inputs).logits).abs().max().item()
    assert torch.equal(*answers), "the kernels changed a token"
    print(f"every one of {len(answers[0])} tokens is the same; the logits differ by {difference} at most")
    print(f"calls: {graft.calls.kernel} of kernels, {graft.calls.reference} of originals in their place")

    title("Saved, and loaded by plain Transformers")
    with tempfile.TemporaryDirectory() as saved:
        model.save_pretrained(saved)
        before, after = load_file(folder / "model.safetensors"), load_file(Path(saved) / "model.safetensors")
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        print(f"{len(after)} tensors, each with the original's name and bits")
        again = transformers.AutoModelForCausalLM.from_pretrained(saved)
        tokens = again.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert torch.equal(tokens, answers[0])
        print("plain Transformers answers the same from the saved folder")

    title("The kernels taken out")
    graft.remove()
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, plain(**inputs).logits)
    mlp = type(model.model.layers[0].mlp).__name__
    print(f"model.layers[0].mlp is a plain {mlp} again; the logits are equal bit for bit")

    title("What next")
    print(f"A kernel is a forward, a layout and rules for its weights. Read one: {REPOSITORY}")
    print("Write your own (docs/kernel-authors.md), put it into your model (docs/users.md):")
    print('  config = KernelConfig({"RMSNorm": "./my_kernel.py:MyRMSNorm"})')
    print("  print(kernelgraft.plan(model, config))        what would happen, before anything does")
    print("  graft = kernelgraft.graft(model, config)      done, in place; graft.remove() undoes it")


if __name__ == "__main__":
    main()
