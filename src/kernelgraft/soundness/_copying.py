"""A copy of a module tree in which a check may run: nothing of the run, no hook, mode or statistic, is in the model."""

import functools
import random
import sys
import threading
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from kernelgraft.contents import Contents

_of_the_process = threading.RLock()


@dataclass(frozen=True)
class Variant:
    words: str
    parameter: Callable[[torch.Tensor], torch.Tensor]
    buffer: Callable[[torch.Tensor], torch.Tensor]
    run_in: AbstractContextManager[Any] = field(default_factory=nullcontext)


@contextmanager
def isolated(model: nn.Module) -> Iterator[None]:
    """No gradients, nothing compiled, and every random state as it was."""
    numpy_random = sys.modules.get("numpy.random")
    with ExitStack() as stack:
        # Random states and the stance belong to the process: two threads must not cross, or one puts back what the
        # other set.
        stack.enter_context(_of_the_process)
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        found = {each.device for each in Contents(model).all_parameters.values()}
        devices = {device for device in found if device.type not in ("cpu", "meta")}
        for kind in {device.type for device in devices} or {"cuda"}:
            indices = [device.index for device in devices if device.type == kind]
            stack.enter_context(torch.random.fork_rng(indices, device_type=kind))
        stack.callback(random.setstate, random.getstate())
        if numpy_random is not None:
            stack.callback(numpy_random.set_state, numpy_random.get_state())
        if "torch._dynamo" in sys.modules:
            # A compiled function inside the model would trace the witnesses.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def wrap_forward(module: nn.Module, call: Callable[..., Any]) -> None:
    forward = module.forward

    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return call(forward, args, kwargs)

    module.__dict__["forward"] = wrapped


_ATOMS = (int, float, bool, str, type(None), torch.dtype, torch.device, type, types.FunctionType)
_HOOKS = tuple(name for name in nn.Module().__dict__ if name.endswith("_hooks") or "_hooks_" in name)


class Copier:
    """A copy of a module tree: new module objects, converted tensors, everything else shared.

    Hooks are left out, and so are the forwards that accelerate and `Module.compile` put into an instance: they act on
    the original. Attributes that lead back into the tree lead into the copy.
    """

    def __init__(self, model: nn.Module, variant: Variant, shells: set[str]) -> None:
        self.model, self.variant = model, variant
        self.shells = {id(model.get_submodule(path)) for path in shells}
        self.done: dict[int, Any] = {}

    def copy(self) -> nn.Module:
        return self.module(self.model)

    def module(self, module: nn.Module) -> nn.Module:
        if id(module) in self.done:
            found: nn.Module = self.done[id(module)]
            return found
        if isinstance(module, torch.jit.ScriptModule):  # its state is not in Python
            return module
        new: nn.Module = object.__new__(type(module))
        self.done[id(module)] = new
        state = new.__dict__
        shell = id(module) in self.shells
        for name, value in module.__dict__.items():
            if name in _HOOKS:
                state[name] = OrderedDict()
            elif name in ("_parameters", "_buffers", "_modules"):
                state[name] = {} if shell else {key: self.value(each) for key, each in value.items()}
            elif name == "gradient_checkpointing":  # recomputing does not change who uses what, but switches caches off
                state[name] = False
            elif type(value) in _ATOMS:
                state[name] = value
            elif not shell or not isinstance(value, nn.Module):
                state[name] = self.value(value)
        state.pop("_compiled_call_impl", None)
        if "_hf_hook" in state:
            state.pop("forward", None)
        return new

    def tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in self.done:
            if isinstance(tensor, nn.Parameter):
                new = self.variant.parameter(tensor)
                if new is not tensor:
                    new = nn.Parameter(new, requires_grad=tensor.requires_grad)
            else:
                new = self.variant.buffer(tensor)
            self.done[id(tensor)] = new
        found: torch.Tensor = self.done[id(tensor)]
        return found

    def value(self, value: Any) -> Any:
        if type(value) in _ATOMS:
            return value
        if isinstance(value, nn.Module):
            return self.module(value)
        if isinstance(value, torch.Tensor):
            return self.tensor(value)
        kind = type(value)
        if kind in (list, tuple, set):
            return kind(self.value(item) for item in value)
        if kind in (dict, OrderedDict):
            return kind((key, self.value(item)) for key, item in value.items())
        if kind is types.MethodType and isinstance(value.__self__, nn.Module):
            return types.MethodType(value.__func__, self.module(value.__self__))
        if kind is functools.partial:
            return functools.partial(self.value(value.func), *self.value(value.args), **self.value(value.keywords))
        if kind is weakref.ref and isinstance(value(), nn.Module):
            return weakref.ref(self.module(value()))
        return value
