"""Whether a fusion may be made: each absorbed output goes to the next member of the chain, and nowhere else.

A fused kernel computes what its members computed one after the other, so what one member hands to the next is no longer
there for anybody else. Which code of a model looks at it cannot be read off its modules. So the model runs once, on
tensors without data, and each output that would be absorbed is a witness: a tensor that reports every use of it except
by the next member.

What runs is a copy of the module tree (the same objects everywhere but in the tree itself), so nothing of the run, no
hook, no mode and no running statistic, is ever in the model.
"""

import copy
import functools
import gc
import inspect
import operator
import random
import re
import sys
import threading
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from kernelgraft.errors import PlanError

Run = Callable[[nn.Module], Any]
_NUM_REASONS_SHOWN = 3


@dataclass(frozen=True)
class FusionSite:
    """One fusion in one model.

    Attributes:
        parent: Path of the module that holds the members, `""` for the model itself.
        members: Paths of the members in the order in which data flows through them.
        host: The path among them where the fused kernel will stand.
    """

    parent: str
    members: tuple[str, ...]
    host: str


@dataclass(frozen=True)
class Verdict:
    """Whether a fusion is sound; `None` is "not checked", and `reason` says why.

    A reason names members and other modules relative to the parent.
    """

    sound: bool | None
    reason: str


def check_soundness(
    model: nn.Module, sites: Sequence[FusionSite], run: Run | None, *, live: bool
) -> dict[FusionSite, Verdict]:
    """Proves or refutes for each site that its members are used in a chain only.

    One forward in eval and one in train, on meta tensors; where the model cannot run so, on meta tensors in bfloat16;
    where it cannot run so either and `live`, on its own tensors. The model is left exactly as it was.

    Args:
        model: The untouched model, on any device.
        sites: The fusions to check.
        run: Does one forward of the model that it is given, with inputs on the device of that model's parameters;
            `forward_runner` or `example_runner` make one. Without it nothing can be checked.
        live: Whether the model's own tensors hold values, so that a forward with them is possible.

    Raises:
        PlanError: A site names a module that the model does not have, is no chain, or overlaps another one.
    """
    _validate(model, sites)
    if run is None:
        why = "not checked: no forward of this model can be made up; give example inputs"
        return {site: Verdict(None, why) for site in sites}
    if not sites:
        return {}
    decided: dict[FusionSite, Verdict] = {}
    failures: dict[str, str] = {}
    equal = _equal_layers(model, sites)
    # Layers that equal others are left out first. Only where that does not work do all of them run.
    for groups in (equal, []) if equal else ([],):
        for variant in _variants(model, live):
            verdicts, failure = _attempt(model, sites, run, variant, groups)
            if failure is None and groups and len(verdicts) < len(sites):
                verdicts, failure = _attempt(model, sites, run, variant, [])
            decided = verdicts | decided
            if failure is None or len(decided) == len(sites):
                return {site: decided[site] for site in sites}
            failures[variant.words] = failure
    why = "; ".join(f"{words}: {failure}" for words, failure in failures.items())
    return {site: decided.get(site, Verdict(None, f"not checked: the model does not run {why}")) for site in sites}


def example_runner(*args: Any, **kwargs: Any) -> Run:
    """A run with the caller's own example inputs, moved to the device and floating dtype of the model that it gets."""

    def run(model: nn.Module) -> Any:
        device, dtype = _device(model), _floating_dtype(model)

        def placed(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, dtype if tensor.is_floating_point() else None)

        return model(*_mapped(args, placed), **_mapped(kwargs, placed))

    return run


def forward_runner(model: nn.Module) -> Run | None:
    """A run with made-up inputs, for a model that says what it takes as Transformers models do; otherwise `None`.

    Asked for are `config` and `main_input_name`. Models inside the model that take another kind of input (a vision
    tower) and did not run with it are run on their own.
    """
    if _inputs(model, torch.device("meta")) is None:
        return None

    def run(model: nn.Module) -> None:
        _run_with_inputs(model)
        main = getattr(model, "main_input_name", None)
        for module in model.modules():
            if getattr(module, "main_input_name", main) != main and hasattr(module, "config"):
                with suppress(Exception):  # what does not run so has not run: that is then the verdict on it
                    _run_with_inputs(module)

    return run


# Inputs


_NUM_TOKENS = 4


def _run_with_inputs(model: nn.Module) -> None:
    inputs = _inputs(model, _device(model))
    if inputs is None:
        return
    dtype, takes = _floating_dtype(model), inspect.signature(model.forward).parameters
    inputs = {name: each.to(dtype) if each.is_floating_point() else each for name, each in inputs.items()}
    # Without a cache, Transformers looks for packed sequences in the values of the positions: impossible on meta.
    cache = {"use_cache": True} if "use_cache" in takes else {}
    try:
        model(**inputs, **cache)
    except Exception:
        if "input_ids" not in inputs or "attention_mask" not in takes:
            raise
        # Without a mask it looks for padding in the values of the tokens, and in those of a mask of two dimensions.
        mask = torch.zeros(1, 1, _NUM_TOKENS, _NUM_TOKENS, dtype=dtype, device=_device(model))
        model(**inputs, **cache, attention_mask=mask)


def _inputs(model: nn.Module, device: torch.device) -> dict[str, torch.Tensor] | None:
    config, main = getattr(model, "config", None), getattr(model, "main_input_name", None)
    if config is None or not isinstance(main, str):
        return None
    takes = inspect.signature(model.forward).parameters

    def of(*names: str, default: Any = None) -> Any:
        for each in (config, *(getattr(config, name, None) for name in ("vision_config", "audio_config", "encoder"))):
            for name in names:
                if getattr(each, name, None) is not None:
                    return getattr(each, name)
        return default

    def tokens() -> torch.Tensor:
        not_padding = 1 if getattr(config, "pad_token_id", None) == 0 else 0
        return torch.full((1, _NUM_TOKENS), not_padding, dtype=torch.int64, device=device)

    def pixels() -> torch.Tensor:
        size = of("image_size", default=224)
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        frames = (of("num_frames"),) if of("num_frames") is not None else ()
        return torch.zeros(1, *frames, of("num_channels", default=3), height, width, device=device)

    def features() -> torch.Tensor:
        num_bins = of("num_mel_bins", "input_feat_per_channel", "input_dim", default=80)
        length = 2 * of("max_source_positions", default=50)  # Whisper takes exactly this; a convolution halves it
        frames_first = of("input_feat_per_channel", "input_dim", "feature_projection_input_dim") is not None
        return torch.zeros((1, length, num_bins) if frames_first else (1, num_bins, length), device=device)

    def samples() -> torch.Tensor:
        is_spectrogram = of("num_mel_bins") is not None and of("max_length") is not None
        return torch.zeros((1, of("max_length"), of("num_mel_bins")) if is_spectrogram else (1, 16000), device=device)

    makers = {"input_ids": tokens, "pixel_values": pixels, "input_features": features, "input_values": samples}
    if main not in makers:
        return None
    inputs = {main: makers[main]()}
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in takes:
        inputs["decoder_input_ids"] = tokens()
    # Two towers side by side take both; a model that puts an image between its tokens takes tokens alone.
    names_a_token = any(hasattr(config, name) for name in ("image_token_id", "image_token_index"))
    if main == "input_ids" and "pixel_values" in takes and hasattr(config, "vision_config") and not names_a_token:
        inputs["pixel_values"] = pixels()
    return inputs


def _device(model: nn.Module) -> torch.device:
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def _floating_dtype(model: nn.Module) -> torch.dtype:
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            return tensor.dtype
    return torch.get_default_dtype()


# The witness


# What may be asked of an absorbed output: the fused kernel's own has it too. Of shapes that is checked.
_METADATA = re.compile(
    "device|dtype|element_size|get_device|grad_fn|is_(complex|contiguous|cpu|cuda|floating_point|leaf|meta|mps|nested"
    "|quantized|sparse|tensor|xpu)|itemsize|layout|requires_grad|__hash__"
)
_SHAPE = re.compile("dim|ndim|ndimension|nelement|numel|shape|size|stride|nbytes|__len__")


class _Witness(torch.Tensor):
    """An absorbed output that reports to its site whatever is done with it."""

    site_trace: "_Trace"
    member: int
    num_taken: int

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", str(func))
        if name == "__get__":
            name = getattr(getattr(func, "__self__", None), "__name__", name)

        def testify(tensor: torch.Tensor) -> torch.Tensor:
            if isinstance(tensor, _Witness):
                if _SHAPE.fullmatch(name):
                    tensor.site_trace.read_shape(tensor)
                elif not _METADATA.fullmatch(name):
                    tensor.site_trace.used(tensor, name)
            return _plain(tensor)

        return func(*_mapped(tuple(args), testify), **_mapped(kwargs or {}, testify))


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    if not isinstance(tensor, _Witness):
        return tensor
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.as_subclass(torch.Tensor)


@dataclass
class _Round:
    """One forward of the parent."""

    num_calls: list[int]
    witnesses: list[_Witness] = field(default_factory=list)
    shapes_read: list[tuple[int, torch.Size]] = field(default_factory=list)
    input_shape: torch.Size | None = None
    output_shape: torch.Size | None = None


class _Trace:
    """What one site's members and parent did while the model ran."""

    def __init__(self, model: nn.Module, site: FusionSite, paths: dict[int, str]) -> None:
        self.site, self.paths = site, paths
        self.names = [_relative(path, site.parent) for path in site.members]
        self.host = site.members.index(site.host)
        self.reasons: list[str] = []
        self.ran_in: set[bool] = set()
        self.called_outside = False
        self.rounds: list[_Round] = []
        self.witnessed: list[tuple[weakref.ref[torch.Tensor], int]] = []
        self.scope = model.get_submodule(_scope(model, site.parent))
        members = [model.get_submodule(path) for path in site.members]
        for index, member in enumerate(members):
            _wrap_forward(member, functools.partial(self.call_member, index))
        _wrap_forward(self.scope, self.call_scope)

    def refuse(self, reason: str) -> None:
        if reason not in self.reasons:
            self.reasons.append(reason)

    def output(self, member: int) -> str:
        return f"the output of {self.names[member]!r}"

    def used(self, witness: _Witness, function: str) -> None:
        user = self.running()
        by = f"{user!r} ({function})" if user else f"{function} in the forward of {type(self.scope).__name__}"
        self.refuse(f"{self.output(witness.member)} is also used by {by}")

    def running(self) -> str | None:
        """The innermost module that is running, if it is not the parent itself."""
        frame: types.FrameType | None = sys._getframe(1)
        while frame is not None:
            if frame.f_code is nn.Module._call_impl.__code__:
                module = frame.f_locals["self"]
                path = self.paths.get(id(module))
                return None if module is self.scope or path is None else _relative(path, self.site.parent)
            frame = frame.f_back
        return None

    def read_shape(self, witness: _Witness) -> None:
        if self.rounds:
            self.rounds[-1].shapes_read.append((witness.member, _plain(witness).shape))

    def call_scope(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        this = _Round([0] * len(self.names))
        self.rounds.append(this)
        try:
            output = forward(*args, **kwargs)
        finally:
            self.rounds.pop()
        if any(this.num_calls):
            self.ran_in.add(self.scope.training)
            self.judge(this)
        for tensor in _tensors(output):
            if self.is_own(tensor):
                self.refuse(f"{self.output(tensor.member)} is returned by {type(self.scope).__name__}")
        return output

    def judge(self, this: _Round) -> None:
        for name, count in zip(self.names, this.num_calls, strict=True):
            if count > 1:
                self.refuse(f"{name!r} is called {count} times")
            if not count:
                self.refuse(
                    f"{name!r} does not run, while {self.names[this.num_calls.index(max(this.num_calls))]!r} does"
                )
        for member in range(len(self.names) - 1):
            taken = [witness.num_taken for witness in this.witnesses if witness.member == member]
            if this.num_calls[member] == 1 and this.num_calls[member + 1] == 1 and sum(taken) > 1:
                self.refuse(f"{self.output(member)} is taken by {self.names[member + 1]!r} {sum(taken)} times")
        for member, shape in this.shapes_read:
            # Before the host, an absorbed member hands on its input; from the host on, what the kernel returned.
            will_be = this.input_shape if member < self.host else this.output_shape
            if will_be is not None and shape != will_be:
                change = f"it is {tuple(shape)}, and would become {tuple(will_be)}"
                self.refuse(f"the shape of {self.output(member)} is read: {change}")
        this.witnesses.clear()

    def call_member(
        self, index: int, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if not self.rounds:
            self.called_outside = True
            return forward(*args, **kwargs)
        this, name = self.rounds[-1], self.names[index]
        this.num_calls[index] += 1
        expected = False
        for tensor in _tensors((args, kwargs)):
            if not self.is_own(tensor):
                continue
            if tensor.member == index - 1:
                tensor.num_taken += 1
                expected = True
            else:
                self.refuse(f"{self.output(tensor.member)} is also used by {name!r}")
        if index and not expected:
            self.refuse(f"{name!r} does not take {self.output(index - 1)}")
        first = args[0] if args else kwargs.get(_first_parameter(forward), next(iter(kwargs.values()), None))
        if index and expected and index != self.host and not self.is_own(first):
            self.refuse(f"{name!r} takes {self.output(index - 1)}, but not as its first argument")
        if index == 0:
            this.input_shape = _plain(first).shape if isinstance(first, torch.Tensor) else None
        args = _mapped(args, self.unwrapped)
        kwargs = _mapped(kwargs, self.unwrapped)
        inputs = [_plain(tensor) for tensor in _tensors((args, kwargs))]
        versions = [tensor._version for tensor in inputs]
        output = forward(*args, **kwargs)
        if index == 0 and versions != [tensor._version for tensor in inputs]:
            self.refuse(f"{name!r} writes into its input in place")
        if index == len(self.names) - 1:
            this.output_shape = next((tensor.shape for tensor in _tensors(output)), None)
            return output
        given = {id(tensor) for tensor in inputs}

        def witness(tensor: torch.Tensor) -> torch.Tensor:
            if id(tensor) not in given and not isinstance(tensor, nn.Parameter):
                self.witnessed.append((weakref.ref(tensor), index))
            made = tensor.as_subclass(_Witness)
            made.site_trace, made.member, made.num_taken = self, index, 0
            this.witnesses.append(made)
            self.witnessed.append((weakref.ref(made), index))
            return made

        return _mapped(output, witness)

    def is_own(self, value: Any) -> bool:
        return isinstance(value, _Witness) and getattr(value, "site_trace", None) is self

    def unwrapped(self, tensor: torch.Tensor) -> torch.Tensor:
        return _plain(tensor) if self.is_own(tensor) else tensor

    def has_living(self) -> bool:
        return any(ref() is not None for ref, _ in self.witnessed)

    def refuse_kept(self) -> None:
        for ref, member in self.witnessed:
            if ref() is not None:
                self.refuse(f"{self.output(member)} is kept somewhere after the forward")

    def verdict(self, how: str, *, complete: bool) -> Verdict | None:
        """`None` where the run did not get far enough to tell."""
        if self.reasons:
            more = len(self.reasons) - _NUM_REASONS_SHOWN
            shown = "; ".join(self.reasons[:_NUM_REASONS_SHOWN])
            return Verdict(False, f"{shown}; and {more} more" if more > 0 else shown)
        if not complete:
            return None
        if self.called_outside:
            return Verdict(None, f"not checked: a member runs outside the forward of {self.site.parent!r}")
        if not self.ran_in:
            return Verdict(None, "not checked: did not run")
        if self.ran_in != {False, True}:
            return Verdict(None, f"not checked: did not run in {'eval' if True in self.ran_in else 'train'}")
        return Verdict(True, f"each output goes to the next member only, in eval and in train ({how})")


# Running the copy


@dataclass(frozen=True)
class _Variant:
    words: str
    parameter: Callable[[torch.Tensor], torch.Tensor]
    buffer: Callable[[torch.Tensor], torch.Tensor]


def _variants(model: nn.Module, live: bool) -> Iterator[_Variant]:
    def on_meta(tensor: torch.Tensor) -> torch.Tensor:
        return tensor if tensor.is_meta else tensor.detach().to("meta")

    def in_bfloat16(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().to("meta", torch.bfloat16 if tensor.is_floating_point() else None)

    yield _Variant("on meta tensors", on_meta, on_meta)
    if any(each.is_floating_point() and each.dtype != torch.bfloat16 for each in model.parameters()):
        yield _Variant("on meta tensors in bfloat16", in_bfloat16, in_bfloat16)
    if live:
        yield _Variant("on its own tensors", lambda tensor: tensor, lambda tensor: tensor.detach().clone())


def _attempt(
    model: nn.Module, sites: Sequence[FusionSite], run: Run, variant: _Variant, groups: "list[_EqualLayers]"
) -> tuple[dict[FusionSite, Verdict], str | None]:
    left_out = {path: group for group in groups for path in group.left_out}
    failure = None
    with _isolated(model):
        try:
            twin = _Copier(model, variant, set(left_out)).copy()
        except Exception as error:  # a module or tensor that cannot be copied so; the next variant may do
            return {}, f"{type(error).__name__}: {error}"
        paths = {id(module): path for path, module in twin.named_modules()}
        traces = {
            site: _Trace(twin, site, paths) for site in sites if not any(_below(site.parent, path) for path in left_out)
        }
        for group in groups:
            group.install(twin)
        for training in (False, True):
            for module in twin.modules():
                module.training = training
            try:
                run(twin)
            except Exception as error:  # anything that a model's forward raises where it cannot run on these tensors
                failure = f"{type(error).__name__}: {str(error).strip()}"[:400]
                break
        for group in groups:
            group.form = None
        if failure is None and any(trace.has_living() for trace in traces.values()):
            gc.collect()
            for trace in traces.values():
                trace.refuse_kept()
    verdicts = {site: trace.verdict(variant.words, complete=failure is None) for site, trace in traces.items()}
    for site in sites:
        for path, group in left_out.items():
            if _below(site.parent, path):
                verdicts[site] = group.verdict(site, verdicts)
    return {site: verdict for site, verdict in verdicts.items() if verdict is not None}, failure


_of_the_process = threading.RLock()


@contextmanager
def _isolated(model: nn.Module) -> Iterator[None]:
    """No gradients, nothing compiled, and every random state as it was."""
    numpy_random = sys.modules.get("numpy.random")
    with ExitStack() as stack:
        # Random states and the stance belong to the process: two threads must not cross, or one puts back what the
        # other set.
        stack.enter_context(_of_the_process)
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        devices = {each.device for each in model.parameters() if each.device.type not in ("cpu", "meta")}
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


def _wrap_forward(module: nn.Module, call: Callable[..., Any]) -> None:
    forward = module.forward

    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return call(forward, args, kwargs)

    module.__dict__["forward"] = wrapped


_ATOMS = (int, float, bool, str, type(None), torch.dtype, torch.device, type, types.FunctionType)
_HOOKS = tuple(name for name in nn.Module().__dict__ if name.endswith("_hooks") or "_hooks_" in name)


class _Copier:
    """A copy of a module tree: new module objects, converted tensors, everything else shared.

    Hooks are left out, and so are the forwards that accelerate and `Module.compile` put into an instance: they act on
    the original. Attributes that lead back into the tree lead into the copy.
    """

    def __init__(self, model: nn.Module, variant: _Variant, shells: set[str]) -> None:
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


# Equal layers


_INDEX_NAMES = ("layer_id", "layer_number", "block_id", "idx", "index")


@dataclass
class _EqualLayers:
    """Layers of one list that differ in their index only: two run, the others hand their input on.

    They do it in the form that the first one returned, and are judged as the two that ran.
    """

    run: tuple[str, str]
    left_out: list[str]
    form: Callable[[tuple[Any, ...], dict[str, Any]], Any] | None = None
    seen: dict[str, set[bool]] = field(default_factory=dict)

    def install(self, model: nn.Module) -> None:
        self.form, self.seen = None, {path: set() for path in self.left_out}
        _wrap_forward(model.get_submodule(self.run[0]), self.learn)
        for path in self.left_out:
            layer = model.get_submodule(path)
            _wrap_forward(layer, functools.partial(self.hand_on, path, layer))

    def learn(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = forward(*args, **kwargs)
        described = next(((each.shape, each.dtype) for each in _tensors((args, kwargs))), None)

        def form(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            handed: Any = next(iter(_tensors((args, kwargs))), None)

            def like(tensor: torch.Tensor) -> torch.Tensor:
                is_handed_on = handed is not None and (tensor.shape, tensor.dtype) == described
                return handed if is_handed_on else torch.zeros_like(tensor)

            return _mapped(output, like)

        self.form = form
        return output

    def hand_on(
        self, path: str, layer: nn.Module, _: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self.form is None:
            raise RuntimeError(f"{path!r} was to be left out, and runs before {self.run[0]!r}, which it equals")
        self.seen[path].add(layer.training)
        return self.form(args, kwargs)

    def verdict(self, site: FusionSite, verdicts: dict[FusionSite, Verdict | None]) -> Verdict | None:
        path = next(path for path in self.left_out if _below(site.parent, path))
        twins = [verdicts.get(_moved(site, path, runner)) for runner in self.run]
        if twins[0] is None or twins[0] != twins[1]:
            return None
        if twins[0].sound and self.seen[path] != {False, True}:
            return Verdict(None, "not checked: did not run")
        return twins[0]


def _moved(site: FusionSite, old: str, new: str) -> FusionSite:
    def moved(path: str) -> str:
        return new + path[len(old) :]

    return FusionSite(moved(site.parent), tuple(map(moved, site.members)), moved(site.host))


def _equal_layers(model: nn.Module, sites: Sequence[FusionSite]) -> list[_EqualLayers]:
    groups: list[_EqualLayers] = []
    by_layer: dict[str, set[FusionSite]] = {}
    cut: set[str] = set()  # what lies between a site's parent and its members
    for site in sites:
        for path in _prefixes(site.parent):
            by_layer.setdefault(path, set()).add(site)
        cut.update(path for member in site.members for path in _prefixes(member) if not _below(site.parent, path))

    def visit(module: nn.Module, path: str) -> None:
        num_before = len(groups)
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 2:
            equal: dict[Any, list[str]] = {}
            for name, child in module.named_children():
                child_path = f"{path}.{name}" if path else name
                if child_path in cut:
                    continue
                inside = frozenset(_moved(site, child_path, "") for site in by_layer.get(child_path, ()))
                equal.setdefault((_likeness(child), inside), []).append(child_path)
            # The last one runs too, since it is the other one that a model treats apart.
            groups.extend(
                _EqualLayers((paths[0], paths[-1]), paths[1:-1]) for paths in equal.values() if len(paths) > 2
            )
        if len(groups) == num_before:
            for name, child in module.named_children():
                visit(child, f"{path}.{name}" if path else name)

    visit(model, "")
    return groups


_INTERNAL = frozenset(nn.Module().__dict__)


def _likeness(module: nn.Module) -> Any:
    """Equal for modules of the same class, attributes and shapes all the way down, the layer's index left out."""
    attributes = tuple(
        (name, _comparable(value))
        for name, value in module.__dict__.items()
        if name not in _INTERNAL and not _is_index(name, value)
    )
    tensors = tuple((name, _comparable(value)) for name, value in module._parameters.items())
    buffers = tuple((name, _comparable(value)) for name, value in module._buffers.items())
    children = tuple((name, None if child is None else _likeness(child)) for name, child in module._modules.items())
    return type(module), attributes, _per_layer(module), tensors, buffers, children


def _per_layer(module: nn.Module) -> Any:
    """What the module's config says about the layer of its index, which a forward may look up."""
    config = module.__dict__.get("config")
    index = next((value for name, value in module.__dict__.items() if _is_index(name, value)), None)
    if index is None or not hasattr(config, "__dict__"):
        return None
    lists = ((name, value) for name, value in vars(config).items() if type(value) in (list, tuple))
    return tuple((name, _comparable(value[index])) for name, value in lists if index < len(value))


def _is_index(name: str, value: Any) -> bool:
    return type(value) is int and name.endswith(_INDEX_NAMES)


def _comparable(value: Any) -> Any:
    kind = type(value)
    if kind in (int, float, str, bool, type(None)):
        return kind, value
    if isinstance(value, torch.Tensor):
        return torch.Tensor, value.shape, value.dtype, value.requires_grad
    if kind in (tuple, list):
        return kind, tuple(map(_comparable, value))
    if kind in (dict, OrderedDict):
        return kind, tuple((key, _comparable(item)) for key, item in value.items())
    return kind, id(value)  # a function, a config: the same one or another one


# Paths and containers


def _validate(model: nn.Module, sites: Sequence[FusionSite]) -> None:
    taken: dict[str, FusionSite] = {}
    for site in sites:
        if len(site.members) < 2 or len(set(site.members)) != len(site.members) or site.host not in site.members:
            raise PlanError(
                f"{site} is no fusion: it takes two or more different members, and the host is one of them. "
                "Name the members in the order in which data flows through them."
            )
        for path in (site.parent, *site.members):
            try:
                model.get_submodule(path)
            except AttributeError as error:
                raise PlanError(
                    f"{site} names {path!r}, which {type(model).__name__} does not have: {error}."
                ) from error
            if path in site.members and taken.setdefault(path, site) is not site:
                raise PlanError(f"{path!r} is in two fusions, {taken[path]} and {site}. Leave one of them out.")


def _scope(model: nn.Module, parent: str) -> str:
    """The nearest module at or above `parent` that has a forward; a list of modules has none."""
    while parent and isinstance(model.get_submodule(parent), (nn.ModuleList, nn.ModuleDict)):
        parent = parent.rpartition(".")[0]
    return parent


def _prefixes(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def _below(path: str, top: str) -> bool:
    return path == top or path.startswith(f"{top}.")


def _relative(path: str, parent: str) -> str:
    return path[len(parent) + 1 :] if parent and path.startswith(f"{parent}.") else path


def _first_parameter(forward: Callable[..., Any]) -> str:
    return next(iter(inspect.signature(forward).parameters), "")


def _mapped(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """`value` with the tensors in its tuples, lists and dicts changed; what holds none stays the same object."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, tuple) or type(value) is list:
        items = [_mapped(item, change) for item in value]
        if all(map(operator.is_, items, value)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        changed = {key: new for key, item in value.items() if (new := _mapped(item, change)) is not item}
        if changed:
            value = copy.copy(value)
            for key, item in changed.items():
                value[key] = item
    return value


def _tensors(value: Any) -> list[Any]:
    found: list[Any] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor)
        return tensor

    _mapped(value, keep)
    return found
