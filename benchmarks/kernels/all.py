"""All rows of issue 7's table, one script after another, each in a process of its own.

    PYTHONPATH=src python -m benchmarks.kernels.all --budget 560

With a budget, a script whose estimate does not fit into what is left of it is left out, and said so: name it in
`--rows` of another call.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence

from benchmarks import machine

ROWS: dict[str, tuple[tuple[str, ...], int]] = {
    "rms_norm": (("rms_norm",), 50),
    "rms_norm_mlp": (("rms_norm_mlp",), 40),
    "decoder_layer": (("decoder_layer",), 60),
    "generate": (("generate",), 50),
    "first_step": (("first_step",), 100),
    "compiled_decode": (("compiled_decode",), 110),
    "training_step": (("training_step",), 100),
}
"""What is started, and about how many seconds it takes on an H200."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for.

    Returns:
        The exit code: 1 if a script failed or was left out.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="only these")
    parser.add_argument("--budget", type=float, help="seconds that all may take")
    asked, others = parser.parse_known_args(arguments)
    path = os.pathsep.join(filter(None, [str(machine.ROOT / "src"), os.environ.get("PYTHONPATH")]))
    began, failed = time.monotonic(), []
    for name in asked.rows:
        command, estimate = ROWS[name]
        left = None if asked.budget is None else asked.budget - (time.monotonic() - began)
        if left is not None and estimate > left:
            print(f"{name}: left out, since it takes about {estimate} s and {left:.0f} s are left", flush=True)
            failed.append(name)
            continue
        start = time.monotonic()
        call = [sys.executable, "-m", f"benchmarks.kernels.{command[0]}", *command[1:], *others]
        try:
            code = subprocess.run(
                call, cwd=machine.ROOT, env={**os.environ, "PYTHONPATH": path}, timeout=left, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            code = -1
        ended = f"ended with code {code}" if code else "done"
        print(f"{name}: {ended} after {time.monotonic() - start:.0f} s\n", flush=True)
        failed += [name] if code else []
    if failed:
        print(f"Not all is there: {', '.join(failed)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
