"""What `launching.Launch` hands to a GPU's driver, by a driver that only writes it down; the interpreter must be off.

`python launched_without_gpu.py` compiles a small kernel as for an H100 and prints nothing if all is as it should be.
"""

import weakref

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

from kernelgraft.kernels import device, launching, many_tokens_kernels
from kernelgraft.kernels.launching import Launch

launches, asked, compiled = [], [], []


class Utils:
    def load_binary(self, name, *_):
        return object(), f"{name} {len(asked)}", 0, 0, 1024

    def unload_module(self, _):
        """Of a module that never was."""

    def get_device_properties(self, _):
        return {"max_shared_mem": 227 << 10}


class Launcher:
    """In the place of `CudaLauncher`."""

    def __init__(self, src, metadata):
        self.pdl = metadata.launch_pdl

    def __call__(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *args):
        launches.append(((x, y, z), stream, function, metadata, self.pdl, args))


class Driver:
    launcher_cls, utils = Launcher, Utils()
    device = 0

    def get_current_device(self):
        return self.device

    def get_current_stream(self, index):
        return 100 + index

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


@triton.jit
def scaled(x_ptr, y_ptr, num, step, factor, OFFSET: tl.constexpr, BLOCK: tl.constexpr):
    at = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)) * step
    tl.store(y_ptr + at, tl.load(x_ptr + at, mask=at < num) * factor + OFFSET, mask=at < num)


def run(launch, *pointers):
    """What reached the driver, and whether Triton was asked for the kernel."""
    launches.clear()
    before = len(asked)
    launch(*pointers)
    assert len(launches) == 1
    return launches[0], len(asked) > before


def look_at_descriptors(launch):
    """Of a kernel that takes them: made once for an address, without its tensor, which may be let go."""
    device.num_multiprocessors = lambda _: 132
    x, weight = (torch.zeros(shape, dtype=torch.bfloat16) for shape in ((512, 576), (1024, 576)))
    prepared = [each.to("meta") for each in (x, weight)]
    launches.clear()
    with device.preparing(torch.device("cpu")):
        launch(*prepared, "silu")
    assert not launches
    known = len(compiled)
    first, _ = run(launch, x, weight, "silu")
    again, searched = run(launch, x, weight, "silu")
    assert not searched
    assert len(compiled) == known
    assert first[4] is False  # as on a device where none begins before another has ended
    assert first[5][:2] == again[5][:2]
    assert [each.base.data_ptr() for each in again[5][:2]] == [x.data_ptr(), weight.data_ptr()]
    assert first[5][3:] == again[5][3:]
    held = weakref.ref(x)
    del x
    assert held() is None


def main():
    triton.runtime.driver.set_active(Driver())
    device.in_triton = lambda x: True
    real = type(scaled).run
    type(scaled).run = lambda self, *args, **kwargs: asked.append(self) or real(self, *args, **kwargs)
    triton.knobs.compilation.listener = lambda **told: compiled.append(told)
    x = torch.zeros(64)
    values = (64, 1, 0.5, 2.0, 16)
    launch = Launch(scaled, (4,), values, num_warps=2, launch_pdl=True)

    # The second launch hands over the same as the first, without Triton's search.
    first, searched = run(launch, x, x)
    assert searched
    assert first[:2] == ((4, 1, 1), 100)
    assert first[4]
    assert first[5][0] is x
    assert first[5][2:] == values
    assert first[3][0] == 2
    assert run(launch, x, x) == (first, False)

    # Another alignment of any pointer, dtype and device has a kernel of its own, which is that of Triton.
    kernels = {first[2]}
    for pointers in ((x[1:], x), (x, x[1:]), (x[1:], x[2:]), (x.half(), x), (x, x.half())):
        other, searched = run(launch, *pointers)
        assert searched, pointers
        assert other[2] not in kernels, pointers
        assert run(launch, *pointers) == (other, False)
        kernels.add(other[2])
    assert run(launch, x[4:], x[8:])[1] is False
    Driver.device = 1
    other, searched = run(launch, x, x)
    assert searched
    assert other[1] == 101
    assert other[2] != first[2]
    assert run(launch, x, x) == (other, False)
    Driver.device = 0
    assert run(launch, x, x) == (first, False)

    # Other numbers, constants and options belong to another `Launch`.
    for changed in ((64, 2, 0.5, 2.0, 16), (63, 1, 0.5, 2.0, 16), (64, 1, 0.5, 1.0, 16), (2**40, 1, 0.5, 2.0, 16)):
        other, searched = run(Launch(scaled, (4,), changed, num_warps=2, launch_pdl=True), x, x)
        assert searched
        assert other[2] != first[2]
    other, _ = run(Launch(scaled, (4, 3), values, num_warps=4), x, x)
    assert other[0] == (4, 3, 1)
    assert other[3][0] == 4
    assert not other[4]

    # Who looks on sees every launch.
    hooks, seen = triton.knobs.runtime, []
    for chain in (hooks.launch_enter_hook, hooks.launch_exit_hook):
        chain.add(seen.append)
        assert run(launch, x, x)[1]
        chain.remove(seen.append)
        assert not run(launch, x, x)[1]
    scaled.add_pre_run_hook(lambda *args, **kwargs: seen.append(args))
    assert run(launch, x, x)[1]
    assert seen[-1][2:] == values
    scaled.pre_run_hooks.clear()
    assert not run(launch, x, x)[1]

    # For tensors on the meta device it is loaded, as for others of their dtypes, and not launched: here or in Triton.
    prepared, given = Launch(scaled, (4,), values, num_warps=8), [torch.empty(64, device="meta")] * 2
    launches.clear()
    with device.preparing(torch.device("cpu")):
        for _ in range(2):
            prepared(*given)
            launching.run(scaled, (4,), *given, *values, num_warps=1)
    assert not launches
    assert run(prepared, x, x) == (launches[0], False)
    before = len(compiled)
    launching.run(scaled, (4,), x, x, *values, num_warps=1)
    assert len(launches) == 2
    assert len(compiled) == before

    look_at_descriptors(launch=many_tokens_kernels.launch)

    # Where it is not known how a kernel is run, Triton runs it.
    device.in_triton = lambda x: False
    assert run(launch, x, x)[1]
    device.in_triton = lambda x: True
    launching._KNOWN = False
    assert run(launch, x, x)[1]
    launching._KNOWN = True
    assert not launching._is_cuda(None)


if __name__ == "__main__":
    assert launching._KNOWN, triton.__version__
    main()
