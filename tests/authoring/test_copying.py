"""Code that is copied into a new repository: with what it reads by name, or not at all."""

import functools
import math
from collections import OrderedDict
from math import sqrt

import torch
from torch import nn
from torch.nn import functional as F

from kernelgraft.authoring.copying import copied_class, copied_init, copy_of, imports_of

HERE = __name__
CONSTANT = 2.0


def helper(x):
    return x


def decorated(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


class Plain(nn.Module):
    def __init__(self, size, *, bias=True, **rest):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.scale = sqrt(size) * math.pi

    @decorated
    def forward(self, x, eps=CONSTANT):
        seen = OrderedDict(x=helper(x))
        return F.silu(seen["x"]) * self.weight * self.scale + eps


class WithMethod(Plain):
    def __init__(self, size):
        nn.Module.__init__(self)
        self.size = size

    def helped(self, x):
        return x

    def forward(self, x):
        return self.helped(x)


class OnItsBase(Plain):
    def __init__(self, size):
        super().__init__(size, bias=False)

    def forward(self, x):
        return super().forward(x)


def local():
    outer = 3

    class Local(nn.Module):
        def forward(self, x):
            return x * outer

    return Local


def test_a_method_is_copied_with_its_decorators_and_the_imports_of_what_it_reads():
    forward = copy_of(Plain.forward, calls_super=False)
    assert forward.source.startswith("@decorated\ndef forward(self, x, eps=CONSTANT):")
    assert forward.reads == {"weight", "scale"}
    plain, guarded = imports_of([forward, copied_init(Plain)])
    of_python = ["from collections import OrderedDict", "from math import sqrt", "import math"]
    assert sorted(plain) == sorted([*of_python, "from torch.nn import functional as F"])
    assert guarded == [f"from {HERE} import CONSTANT, decorated, helper"]
    indented = forward.indented().splitlines()
    assert indented[:2] == ["    @decorated", "    def forward(self, x, eps=CONSTANT):"]


def test_parameters_are_declared_and_handed_on():
    init = copied_init(Plain)
    assert (init.arguments, init.call) == ("size, *, bias=True, **rest", "size, bias=bias, **rest")


def test_what_needs_its_class_is_left_where_it_is():
    assert copy_of(OnItsBase.forward, calls_super=False) is None
    assert copied_init(OnItsBase) is None  # it hands arguments to its base
    assert copy_of(local().forward, calls_super=False) is None  # a closure
    assert copy_of(nn.Linear(1, 1).__repr__, calls_super=False) is not None
    assert copied_class(OnItsBase) is None
    helped = copied_class(WithMethod)
    assert helped.init is None  # the forward calls a method that a layout would not have
    assert helped.input == "x"


def test_an_import_of_many_names_stands_in_several_lines():
    forward = copy_of(Plain.forward, calls_super=False)
    names = {f"name_{index:02}": object() for index in range(20)}
    _, (guarded,) = imports_of([type(forward)(**{**vars(forward), "names": names})])
    assert guarded.startswith(f"from {HERE} import (\n    name_00,\n")
    assert max(map(len, guarded.splitlines())) < 110
