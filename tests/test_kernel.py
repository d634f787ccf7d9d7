"""What a kernel is, what a kernel class must be, and what is said about one that is none."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from kernel_repositories import refused, write_file
from kernelgraft.config import KernelConfig
from kernelgraft.errors import ConfigTypeError, KernelError
from kernelgraft.kernel import Kernel, load_kernel, use_text

# --- what a kernel class must be --------------------------------------------------------------------------------------


class WithInit(nn.Module):
    def __init__(self):
        super().__init__()

    def forward(self, x): ...


class WithConstant(nn.Module):
    block_size = 128

    def forward(self, x): ...


class WithParameter(nn.Module):
    weight = nn.Parameter(torch.ones(1))

    def forward(self, x): ...


class WithModule(nn.Module):
    linear = nn.Linear(1, 1)

    def forward(self, x): ...


class Inherits(WithConstant):
    pass


class PlainWithInit:
    def __init__(self, x):
        self.x = x

    def forward(self, x): ...


class WithSlots:
    __slots__ = ("cache",)

    def forward(self, x): ...


@pytest.mark.parametrize(
    ("cls", "word"),
    [
        (WithInit, "it defines __init__"),
        (WithConstant, "block_size = int"),
        (WithParameter, "weight = Parameter"),
        (WithModule, "linear = Linear"),
        (Inherits, "block_size = int (in its base 'WithConstant')"),
        (PlainWithInit, "it defines __init__"),
        (WithSlots, "cache = member_descriptor"),
    ],
)
def test_a_kernel_class_carries_no_state(cls, word):
    with pytest.raises(KernelError) as error:
        load_kernel(cls)
    for part in (word, "carries state", f"class {cls.__name__}Layout(nn.Module)", cls.__module__):
        assert part in str(error.value)


def test_a_layout_is_no_kernel(tmp_path):
    layers = "class layers:\n    FastNormLayout = FastNormLayout\n    FastNorm = FastNorm\n"
    place = write_file(tmp_path, layers=layers)
    assert "is a layout; name the kernel: 'FastNorm'" in refused(place, "FastNormLayout")


def test_a_kernel_class_has_a_forward():
    class NoForward(nn.Module):
        def froward(self, x): ...

    with pytest.raises(KernelError, match=r"has no forward; its methods are 'froward'"):
        Kernel(NoForward)


def test_what_a_kernel_class_may_have():
    class Fine(nn.Module):
        has_backward = False
        can_torch_compile = True
        weight: torch.Tensor
        variance_epsilon: float

        @staticmethod
        def supports(x):
            return True

        @classmethod
        def other(cls): ...

        @property
        def size(self): ...

        def helper(self): ...

        def forward(self, x): ...

    class PlainFine:
        def forward(self, x): ...

    assert (Kernel(Fine).has_backward, Kernel(Fine).can_torch_compile, Kernel(Fine).supports(1)) == (False, True, True)
    assert Kernel(PlainFine).forward_class is PlainFine


def test_supports_is_asked_before_there_is_an_instance():
    class Method(nn.Module):
        def supports(self, x): ...

        def forward(self, x): ...

    class Text(nn.Module):
        supports = "everything"

        def forward(self, x): ...

    with pytest.raises(KernelError, match="@staticmethod"):
        Kernel(Method)
    with pytest.raises(KernelError, match="'everything'"):
        Kernel(Text)


# --- Kernel objects ---------------------------------------------------------------------------------------------------


class Norm(nn.Module):
    def forward(self, x):
        return x


class NormLayout(nn.Module):
    pass


class OtherLayout(nn.Module):
    pass


def rotate(x):
    return x


rotate.can_torch_compile = True


def test_kernels_made_by_hand():
    kernel = Kernel(Norm)
    assert (kernel.name, kernel.forward_class, kernel.layout) == ("Norm", Norm, NormLayout)
    assert (kernel.reference, kernel.digest) == (f"{__name__}:Norm", None)
    assert kernel.origin == __file__
    assert str(kernel) == kernel.reference
    assert Kernel(Norm, layout=OtherLayout).layout is OtherLayout
    assert Kernel(Norm, OtherLayout) != kernel
    assert load_kernel(kernel) is kernel
    assert load_kernel(Norm) == kernel
    assert (load_kernel(rotate).function, load_kernel(rotate).can_torch_compile) == (rotate, True)
    assert load_kernel(torch.nn.functional.silu).name == "silu"


def test_kernels_are_frozen_values():
    kernel = Kernel(Norm, reference="owner/repo:Norm", digest="x")
    assert kernel == Kernel(Norm)
    assert len({kernel, Kernel(Norm)}) == 1
    assert copy.deepcopy(kernel) == pickle.loads(pickle.dumps(kernel)) == kernel
    with pytest.raises(AttributeError):
        kernel.name = "other"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Kernel(Norm()), "Give the class: Kernel(Norm)"),
        (lambda: Kernel("owner/repo:Name"), "a class with a forward, or a function"),
        (lambda: Kernel(Norm, layout=Norm()), "its layout is Norm()"),
        (lambda: Kernel(Norm, layout=int), "its layout is <class 'int'>"),
        (lambda: Kernel(rotate, layout=NormLayout), "takes no layout"),
        (lambda: load_kernel(None), "a class with a forward, or a function"),
    ],
)
def test_what_is_no_kernel(make, words):
    with pytest.raises(ConfigTypeError) as error:
        make()
    assert words in str(error.value)


def test_use_text():
    config = KernelConfig({"A": "owner/repo@main:Name", "B": Norm, "C": Kernel(Norm), "D": "./x.py:Name"})
    texts = [use_text(entry.choices[0].use) for entry in config.entries]
    assert texts == ["owner/repo@main:Name", f"{__name__}:Norm", f"{__name__}:Norm", f"{Path.cwd()}/x.py:Name"]


def test_what_is_imported_at_first():
    code = "import sys, kernelgraft.config, kernelgraft.kernel; print([m for m in sys.argv[1:] if m in sys.modules])"
    heavy = ["kernels", "transformers", "safetensors", "huggingface_hub", "tomli_w"]
    done = subprocess.run([sys.executable, "-c", code, *heavy], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
