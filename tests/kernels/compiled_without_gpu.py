"""Compiles for a GPU what would be launched there; no GPU is needed, and the interpreter must be off.

The interpreter lets types pass that the compiler refuses, and knows no limit of shared memory. Called with `90`, for an
H100 or H200, or `89`, for an L4 or RTX 4090, it prints a line for each kernel.
"""

import contextlib
import itertools
import subprocess
import sys
import tempfile

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.knobs import nvidia
from triton.runtime.jit import JITFunction

from kernelgraft.kernels import (
    activation,
    cross_entropy_rows,
    decode_attention_kernels,
    device,
    few_tokens,
    many_tokens_kernels,
    one_token_attention,
    overlap,
    rms_norm_backward_kernels,
    rms_norm_kernels,
    rotary_backward_kernels,
    rotary_kernels,
)

TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "i1",
    torch.uint8: "u8",
}
GPUS = {90: (132, 227 << 10), 89: (128, 99 << 10)}
"""By architecture, multiprocessors and the bytes of shared memory that a program can have."""

architecture = 90

DEVICE = "cpu"
"""Where the tensors are; on "cuda", where `sanitized.py` has them, their numbers are drawn."""

HALVES = torch.bfloat16, torch.float16
half = HALVES[0]
"""What has 16 bits in all that is launched now."""

compiled, currents = {}, []


@contextlib.contextmanager
def current(of):
    """In the place of `torch.cuda.device_of`."""
    currents.append(of)
    yield
    currents.pop()


def type_of(value):
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{TYPES[value.base.dtype]}{value.block_shape},{value.layout!r}>"
    if isinstance(value, torch.Tensor):
        return f"*{TYPES[value.dtype]}"
    return "fp32" if isinstance(value, float) else "i32"


def is_constant(value):
    return value is None or (type(value) is int and value == 1)


def is_multiple(value):
    """Of 16, which Triton compiles for by itself."""
    return (value.data_ptr() if isinstance(value, torch.Tensor) else type(value) is int and value) % 16 == 0


def compile_instead(
    self, *args, grid, warmup, num_warps=4, num_stages=3, enable_fp_fusion=True, maxnreg=None, **kwargs
):
    """In the place of a launch. A pointer that is not there is a constant, and so is a 1, as Triton has it."""
    assert currents, f"{self.__name__} goes to whichever GPU is the current one"
    given = {**dict(zip(self.arg_names, args, strict=False)), **kwargs}
    constants = {p.name: given[p.name] for p in self.params if p.is_constexpr or is_constant(given[p.name])}
    signature = {name: "constexpr" if name in constants else type_of(given[name]) for name in self.arg_names}
    known = {(self.arg_names.index(name),): value for name, value in constants.items()}
    multiples = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(self.arg_names)
        if name not in constants and is_multiple(given[name])
    }
    source = (GluonASTSource if self.is_gluon() else ASTSource)(self, signature, known, multiples)
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": enable_fp_fusion}
    options |= {"maxnreg": maxnreg} if maxnreg else {}
    made = compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    assert f".entry {self.__name__}" in made.asm["ptx"]
    assert made.metadata.shared <= GPUS[architecture][1], f"{self.__name__} takes {made.metadata.shared} bytes: {given}"
    compiled.setdefault(self.__name__, []).append(made.asm["ptx"])
    if self.is_gluon():
        look_at_machine_code(made.asm["cubin"])


def empty(*shape, dtype=None):
    dtype = dtype or half
    return torch.randn(shape, device=DEVICE).to(dtype) if DEVICE == "cuda" else torch.empty(shape, dtype=dtype)


def launch(*names):
    """Groups, all if none is named, with each of the dtypes of 16 bits."""
    global half
    for dtype in HALVES:
        half = dtype
        for name in names or GROUPS:
            GROUPS[name]()


def launch_mlps():
    x, weight = empty(64, 1024), empty(1024)
    for act in activation.ACTIVATIONS:
        activation.launch(empty(64, 2048), act)
        activation.launch_backward(x, empty(64, 2048), act)
    norm, up, down = few_tokens.Norm(weight, 1e-6), empty(6144, 1024), empty(1024, 3072)
    for tokens in (1, 4, 32):
        few_tokens.launch(x[:tokens], up, None, norm, "silu", None)
        few_tokens.launch(empty(tokens, 3072), down, empty(1024), None, "", x[:tokens])
    few_tokens.launch(x[:8].float(), up.float(), None, None, "gelu", None)


def launch_attention():
    qkv, cos, head = empty(2, 3, 8 * 128), empty(1, 3, 128), empty(128)
    for weights in ((None, None), (head, head)):
        rotation = (qkv, cos, cos, *weights, 4, 128, 1e-6, 0.0, True)
        q, k, v = rotary_kernels.launch(*rotation, True)
        rotary_backward_kernels.launch_backward(q, k, v, qkv, cos, cos, *weights, qkv.dtype, 1e-6, 0.0, True)
    cache, position = empty(2, 2, 600, 128), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    rotary_kernels.launch_into(*rotation, cache, cache.clone(), position)
    mask = torch.ones(2, 1, 1, 600, dtype=torch.bool, device=DEVICE)
    one_token_attention.launch(empty(2, 4, 1, 128), cache, cache, 0.1, mask, None, None)
    held, longer = (cache, cache.clone()), (empty(2, 2, 601, 128), empty(2, 2, 601, 128))
    for weights in ((None, None), (head, head)):
        rotation = (empty(2, 1, 8 * 128), empty(1, 1, 128), empty(1, 1, 128), *weights, 4, 128, 1e-6, 0.0, True)
        decode_attention_kernels.launch(*rotation, held, held, position, 0.1, mask)
        decode_attention_kernels.launch(*rotation, held, longer, None, 0.1, None)
    decode_attention_kernels.launch(*rotation, held, held, position, 0.1, mask, follows=True)


def launch_norms():
    """Backward too where rows are few, one, as many as can be few, and many."""
    for rows, columns in ((1, 1024), (32, 4096), (132, 1000), (132, 32768), (300, 1024), (300, 32768)):
        x, weight = empty(rows, columns), empty(columns)
        for dtype, residual, offset in ((half, x, 0.0), (torch.float32, None, 1.0)):
            norm = (weight.to(dtype), 1e-6, offset, not offset)
            rms_norm_kernels.launch(x.to(dtype), residual, *norm, True)
            rstd = empty(rows, dtype=torch.float32)
            given = (x.to(dtype), residual, x.to(dtype), norm[0], rstd)
            rms_norm_backward_kernels.launch_backward(*given, *norm[2:])


def launch_products():
    """Those of few tokens in the sizes that take most shared memory, and in the smallest."""
    for dtype in (half, torch.float32) if half is HALVES[0] else (half,):
        up, down = empty(2 * 12288, 4096, dtype=dtype), empty(4096, 12288, dtype=dtype)
        for tokens in (1, 32, 64):  # of which 32 and 64 are split, where they are not gated
            few_tokens.launch(empty(tokens, 4096, dtype=dtype), up, None, None, "silu", None)
            few_tokens.launch(empty(tokens, 12288, dtype=dtype), down, None, None, "", None)
    for tokens in (1, 2):
        few_tokens.launch(empty(tokens, 515), empty(2, 515), empty(2), few_tokens.Norm(empty(515), 1e-6), "gelu", None)


def launch_many():
    """Products of many tokens: of parts of blocks too, and as on a device so small that a program has several."""
    if architecture != 90:
        return
    before, device.num_multiprocessors = device.num_multiprocessors, lambda _: 2
    for rows, act in itertools.product((130, 256), ("silu", "gelu_tanh", "")):
        assert many_tokens_kernels.launch(empty(rows, 576), empty(528, 576), act) is not None
    device.num_multiprocessors = before


def launch_loss():
    """Plain, and with all that can be asked of it; of fewer classes than a program takes at once, and of more."""
    plain = cross_entropy_rows.Formula(rounds=False)
    everything = cross_entropy_rows.Formula(label_smoothing=0.1, scale=3.0, divides=True, softcap=30.0)
    target, upstream = torch.arange(70, device=DEVICE), empty(1, dtype=torch.float32)
    for num_classes, dtype, gradient in itertools.product((1001, 50257), (half, torch.float32), (False, True)):
        logits, weight, loss = empty(70, num_classes, dtype=dtype), empty(num_classes), empty(70, dtype=torch.float32)
        cross_entropy_rows.launch_rows(logits, target, None, None, loss, plain, gradient)
        cross_entropy_rows.launch_rows(logits, target, weight, upstream, loss, everything, gradient)


GROUPS = {
    "norms": launch_norms,
    "mlps": launch_mlps,
    "products": launch_products,
    "many": launch_many,
    "attention": launch_attention,
    "loss": launch_loss,
}


def look_at_machine_code(cubin):
    """Of products on tensor cores: they wait for each other if the compiler does not understand their order."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(cubin)
        file.flush()
        code = subprocess.run([nvidia.cuobjdump.path, "-sass", file.name], capture_output=True, text=True, check=True)
    assert "STL" not in code.stdout, "registers are written to memory"
    assert code.stdout.count("HGMMA") == 2 * 4, "two groups, four products of 16 numbers each"
    assert code.stdout.count("WARPGROUP.DEPBAR") == 2 * 2, "products wait for each other"


def look_at_ptx():
    """What the compiler may not have done to what was meant."""
    for ptx in compiled["_forward"]:
        assert "fma" not in ptx, "a product that the original rounds goes unrounded into a sum"
    ptx = compiled["_one_token"][0]
    waits = ptx.index("griddepcontrol.wait")
    assert ptx.index("ld.global") < waits < ptx.rindex("ld.global")
    assert ptx[:waits].count("ld.global") > 1, "rows are loaded when the kernel in front has ended"
    assert ptx.rindex("ld.global") < ptx.index("shfl.sync"), "a row is not on its way before x is looked at"
    ptx = compiled["_decode_split"][0]
    assert ptx.index("cp.async.bulk.prefetch.L2") < ptx.index("griddepcontrol.wait") < ptx.index("ld.global")
    ptx = compiled["_decode_split"][-1]
    waits = ptx.index("griddepcontrol.wait")
    assert ptx[:waits].count("ld.global") > 8, "keys and values are loaded when the kernel in front has ended"
    assert waits < ptx.rindex("ld.global"), "what the kernel in front gives is loaded before it is there"
    assert waits < ptx.index("st.global"), "something is written before the kernel in front has ended"
    assert compiled["_product"][0].count("griddepcontrol.wait") == 3, "a group of warps does not wait"


def main(of):
    global architecture
    architecture = of
    num_multiprocessors, shared = GPUS[of]
    JITFunction.run = compile_instead
    device.num_multiprocessors = lambda _: num_multiprocessors
    device.shared_memory = lambda _: shared - device._SCRATCH
    overlap.overlaps = lambda _: of >= 90
    device.elsewhere, torch.cuda.device_of = lambda _: True, current
    launch()
    if of >= 90:
        look_at_ptx()
    for name, ways in compiled.items():
        print(name, len(ways))


if __name__ == "__main__":
    main(int(sys.argv[1]))
