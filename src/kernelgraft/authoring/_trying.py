"""One call of a kernel, outside its model: on fake tensors, compiled, and backwards.

What fails is a fault of the kernel's only if the original goes through where the kernel does not.
"""

import copy
import inspect
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from kernelgraft.authoring.findings import Finding
from kernelgraft.blueprint import PreparedSite
from kernelgraft.kernel import Kernel
from kernelgraft.layouts import put_value
from kernelgraft.soundness._sites import mapped
from kernelgraft.tree import shallow_tree

Call = tuple[tuple[Any, ...], dict[str, Any]]
Make = Callable[[torch.Tensor], torch.Tensor]


def try_site(model: nn.Module, site: PreparedSite, call: Call) -> tuple[list[Finding], list[str]]:
    """Try the kernels of one site with the call that the model makes.

    Returns:
        What is wrong, and what could not be tried.
    """
    findings: list[Finding] = []
    left: list[str] = []
    original = model.get_submodule(site.site.host)
    for kernel in dict.fromkeys(kernel for key in site.keys for _, _, kernel in key.modes):
        trial = _Trial(site, kernel, original, call)
        for check in (trial.fake, trial.compiled, trial.backward):
            try:
                findings += check()
            except _NotTried as why:
                left.append(f"{kernel.name} at {site.site.host}: {why}")
    return findings, left


class _NotTried(Exception):
    """The original does not go through either."""


class _Trial:
    def __init__(self, site: PreparedSite, kernel: Kernel, original: nn.Module, call: Call) -> None:
        self.site, self.kernel, self.original, self.call = site, kernel, original, call
        assert kernel.forward_class is not None
        self.forward: Any = kernel.forward_class.forward  # type: ignore[attr-defined]

    def fake(self) -> Iterator[Finding]:
        """It runs on tensors without data, as torch.compile and torch.export need it."""
        mode = FakeTensorMode(allow_non_fake_inputs=True)

        def run(module: nn.Module, forward: Callable[..., Any]) -> None:
            with mode, torch.no_grad():
                args, kwargs = self._arguments(_empty)
                forward(_filled(module, _empty), *args, **kwargs)

        error = self._failure(run, "fake tensors")
        if error is not None:
            yield self._finding(
                "fake tensors",
                f"it does not run on tensors without data, as torch.compile and torch.export use them: {error}",
                "register what they make, `@torch.library.register_fake`, for each op of your own; read no values in "
                "the forward (.item(), .tolist(), data_ptr(), an `if` on a tensor)",
            )

    def compiled(self) -> Iterator[Finding]:
        """It compiles as one graph if it says so."""
        claims = self.kernel.can_torch_compile

        def run(module: nn.Module, forward: Callable[..., Any]) -> None:
            args, kwargs = self._arguments(_drawn)
            made = _filled(module, _drawn)

            def call(*args: Any, **kwargs: Any) -> Any:
                return forward(made, *args, **kwargs)

            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.compile(_fresh(call), fullgraph=True, backend="eager")(*args, **kwargs)

        error = self._failure(run, "torch.compile")
        if error is not None and claims:
            yield self._finding(
                "torch.compile",
                f"it says can_torch_compile = True, and does not compile as one graph: {error}",
                "wrap what cannot be traced into an op (`@torch.library.custom_op` with `register_fake`), or say "
                "can_torch_compile = False",
            )
        elif error is None and not claims:
            yield self._finding(
                "torch.compile",
                "it compiles as one graph, and does not say so: it is left out wherever a model is compiled by the "
                "kernels library",
                "write can_torch_compile = True into the class",
                "warning",
            )

    def backward(self) -> Iterator[Finding]:
        """Each parameter and the input get a gradient if it says so."""
        if not self.kernel.has_backward:
            return
        missing: list[str] = []

        def run(module: nn.Module, forward: Callable[..., Any]) -> None:
            args, kwargs = self._arguments(_drawn)
            inputs = [each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor)][:1]
            inputs = [each.requires_grad_() for each in inputs if each.is_floating_point()]
            made = _filled(module, _drawn)
            with torch.enable_grad():
                output = forward(made, *args, **kwargs)
                outputs = [each for each in _tensors(output) if each.is_floating_point() and each.requires_grad]
                if outputs:
                    torch.autograd.backward([each.float().sum() for each in outputs])
            parameters = {n: p for n, p in made.named_parameters() if p.requires_grad}
            missing[:] = [name for name, each in parameters.items() if each.grad is None]
            missing[:0] = ["its input" for each in inputs if each.grad is None]

        with torch.random.fork_rng(devices=[]):
            error = self._failure(run, "backward")
            if error is None and "its input" in missing:
                ours = missing[:]
                run(shallow_tree(self.original), type(self.original).forward)
                missing[:] = [name for name in ours if name != "its input" or name not in missing]
        fix = (
            "write a backward (`torch.library.register_autograd`, or torch.autograd.Function) that gives a gradient "
            "for every tensor, or say has_backward = False"
        )
        if error is not None:
            yield self._finding("backward", f"it says has_backward, and a backward raises {error}", fix)
        elif missing:
            said = (
                "has_backward = True" if "has_backward" in dir(self.kernel.forward_class) else "no has_backward = False"
            )
            yield self._finding("backward", f"it says {said}, and there is no gradient for {', '.join(missing)}", fix)

    # --- the call

    def _failure(self, run: Callable[..., None], what: str) -> str | None:
        """What a run with the kernel raises; an error that the original raises too is none of the kernel's."""
        try:
            run(self._layout(), self.forward)
        except Exception as error:
            said = f"{type(error).__name__}: {_first_lines(str(error))}"
        else:
            return None
        try:
            run(shallow_tree(self.original), type(self.original).forward)
        except Exception as error:
            raise _NotTried(f"{what}: the original does not go through alone either ({type(error).__name__})") from None
        return said

    def _arguments(self, make: Make) -> Call:
        # A cache holds tensors of the model's own run, on other devices; a call without one is a call as well.
        args, kwargs = ([*map(_without_cache, self.call[0])], {k: _without_cache(v) for k, v in self.call[1].items()})
        return mapped(tuple(args), make), mapped(kwargs, make)

    def _layout(self) -> nn.Module:
        made = self.site.made
        if made is None:
            return shallow_tree(self.original)
        layout = copy.deepcopy(made.layout)
        for name, value in made.values().items():
            put_value(layout, name, value)
        return self._standing(layout)

    def _standing(self, layout: nn.Module) -> nn.Module:
        """The layout as it answers in a model: what it lacks, its original and the kernel's class have."""
        original, kernel = self.original, self.kernel.forward_class
        own = type(layout)

        def answer(self: nn.Module, name: str) -> Any:
            try:
                return own.__getattr__(self, name)
            except AttributeError:
                found = inspect.getattr_static(kernel, name, None)
                return getattr(original, name) if found is None else found.__get__(self, type(self))

        layout.__class__ = type(own.__name__, (own,), {"__getattr__": answer})
        return layout

    def _finding(self, rule: str, what: str, fix: str, severity: Any = "error") -> Finding:
        return Finding(rule, f"{self.kernel.name}: {what}", self.site.site.host, fix, severity)


def _fresh(function: Any) -> Callable[..., Any]:
    """The function with a code object of its own: torch.compile counts compilations by it, and stops at a few."""
    code = function.__code__.replace()
    return types.FunctionType(code, function.__globals__, function.__name__, None, function.__closure__)


def _filled(module: nn.Module, make: Make) -> nn.Module:
    """The module with new tensors in the place of its own."""
    made: dict[int, Any] = {}
    for each in module.modules():
        for registry in (each._parameters, each._buffers):
            for name, tensor in registry.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    fresh = make(tensor)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(fresh, tensor.requires_grad) if is_parameter else fresh
                registry[name] = made[id(tensor)]
    return module


def _without_cache(value: Any) -> Any:
    return None if hasattr(value, "get_seq_length") else value


def _empty(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")


def _drawn(tensor: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tensor.numel())
    if not tensor.is_floating_point():
        return torch.zeros(tensor.shape, dtype=tensor.dtype)
    return torch.randn(tensor.shape, generator=generator).div_(8).to(tensor.dtype)


def _tensors(output: Any) -> list[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        return [output]
    if isinstance(output, dict):
        output = list(output.values())
    return [each for item in output for each in _tensors(item)] if isinstance(output, list | tuple) else []


def _first_lines(text: str) -> str:
    return " ".join(line.strip() for line in text.strip().splitlines()[:3] if line.strip())[:300]
