"""How often right kernels are blamed, and how near to the limits they come: a script, run by hand.

    PYTHONPATH=src:tests:tests/verify python tests/verify/false_alarms.py SEEDS [DEVICE]   # 200, or 100-200

Every seed draws other weights, inputs and upstream gradients. The kernels are those of `subject.RIGHT`, which round and
add up in other ways than the originals do, a right attention and the guide's kernels in Llama, and experts in Mixtral;
each in float32, bfloat16 and float16.
"""

import sys
import warnings
from collections import defaultdict

import attention_plants
import subject
import torch

import kernelgraft
import test_models
import tiny
from kernelgraft import KernelConfig

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def grafts(seed, dtype, device):
    """What is verified for one seed: a name, the graft, and the inputs, if they have to be given."""
    for index, kernels in enumerate(subject.RIGHT):
        made = subject.model(seed, dtype).to(device)
        inputs = subject.inputs(seed)
        yield f"subject {index}", kernelgraft.graft(made, kernels, example_inputs=inputs), inputs
    mappings = {
        "attention": {"Attention": attention_plants.RightAttention},
        "guide": tiny.guide_mapping(),
    }
    for name, mapping in mappings.items():
        model = tiny.model("llama", seed).to(device, dtype)
        yield name, kernelgraft.graft(model, KernelConfig(mapping, inherit_mapping=False)), None
    experts = test_models.use("experts.py:TransposedExperts")
    model = tiny.model("mixtral", seed).to(device, dtype)
    yield "experts", kernelgraft.graft(model, KernelConfig({"Experts": experts}, inherit_mapping=False)), None


def main(seeds, device="cpu"):
    warnings.simplefilter("ignore")
    done = 0
    found = {"runs": 0, "checks": 0, "alarms": 0, "figures": 0}
    worst = defaultdict(lambda: (0.0, 0.0))
    try:
        for seed in seeds:
            for dtype in DTYPES:
                for name, graft, inputs in grafts(seed, dtype, device):
                    note(graft.verify(inputs, seed=seed), found, worst, f"seed {seed}, {dtype}, {name}")
            done += 1
    except KeyboardInterrupt:
        pass  # what is done counts
    counts = ", ".join(f"{count} {what}" for what, count in found.items())
    print(f"{done} seeds on {device}: {counts}")
    for (name, dtype), (largest, median) in sorted(worst.items()):
        print(f"  {name:<10} {dtype:<9} at most {largest:.2f} of the limit, {median:.2f} at the median")


def note(report, found, worst, what):
    figures = [figure for check in report.checks for figure in check.figures]
    found["runs"] += 1
    found["checks"] += len(report.checks)
    found["alarms"] += not report.passed
    found["figures"] += len(figures)
    for failure in report.failures:
        print(f"{what}: {failure}", flush=True)
    key = what.split(", ")[2], what.split(", ")[1].removeprefix("torch.")
    largest = max(figure.largest / figure.limit for figure in figures)
    median = max(figure.median / figure.median_limit for figure in figures)
    worst[key] = max(worst[key][0], largest), max(worst[key][1], median)


if __name__ == "__main__":
    start, _, stop = sys.argv[1].rpartition("-")
    main(range(int(start or 0), int(stop)), *sys.argv[2:])
