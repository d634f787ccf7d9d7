"""Runs on a GPU what `compiled_without_gpu.py` compiles, for NVIDIA's sanitizer to look on.

PYTHONPATH=src compute-sanitizer --error-exitcode 1 python tests/kernels/sanitized.py [norms mlps products ...]

Its racecheck takes minutes for the products, so groups can be named, and go side by side.
"""

import argparse

import compiled_without_gpu as compiled
import torch


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", choices=[*compiled.GROUPS, []], help="all, if none is named")
    parser.add_argument("--once", action="store_true", help="without the second launches, which are looked up")
    asked = parser.parse_args()
    compiled.DEVICE = "cuda"
    torch.manual_seed(0)
    for _ in range(1 if asked.once else 2):
        compiled.launch(*asked.groups)
    torch.cuda.synchronize()
    print("all of them ran:", *(asked.groups or compiled.GROUPS))


if __name__ == "__main__":
    main()
