"""Runs on a GPU what `compiled_without_gpu.py` compiles, and the loss, for NVIDIA's sanitizer to look on.

PYTHONPATH=src compute-sanitizer --error-exitcode 1 python tests/kernels/sanitized.py [norms mlps products ...]

Its racecheck takes minutes for the products, so groups can be named, and go side by side.
"""

import sys

import compiled_without_gpu as compiled
import torch

from kernelgraft.kernels import cross_entropy


def launch_loss():
    hidden, weight = compiled.empty(70, 64).requires_grad_(), compiled.empty(1001, 64).requires_grad_()
    target = torch.arange(70, device="cuda")
    cross_entropy.linear_cross_entropy(hidden, weight, target, softcap=30.0, label_smoothing=0.1).backward()


def main(named):
    compiled.DEVICE = "cuda"
    groups = {**compiled.GROUPS, "loss": launch_loss}
    for _ in range(2):  # the second launches are those that are looked up
        for name in named or groups:
            groups[name]()
    torch.cuda.synchronize()
    print("all of them ran:", *(named or groups))


if __name__ == "__main__":
    main(sys.argv[1:])
