"""Constructor arguments of modules: which ones a module was built with, and how a layout takes them.

A layout for one module gets the arguments that the original's `__init__` got, and a module does not keep them. They are
read off the frames named `__init__` while the module is built (`hearing.py`): no class is patched.

What was recorded is kept beside the modules in a map with weak keys, because storing it in them would write it into
their pickles and copies. So this one map is not a registry: it says nothing that outlives the module it is about, and
nothing about a module that was built outside a `recorded()` block.
"""

import inspect
import operator
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import CodeType, FrameType
from typing import Any

import torch
from torch import nn

from kernelgraft.errors import PlanError
from kernelgraft.hearing import inits_heard

_EMPTY = inspect.Parameter.empty


@dataclass(frozen=True)
class Arguments:
    """What the `__init__` of a module got.

    Given and default cannot be told apart: a parameter that can be given by position is in `args`, with its default if
    the caller left it out; the other ones are in `kwargs`. The values are the objects themselves, not copies.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Recording:
    """The arguments of every module that was built inside one `recorded()` block."""

    def __init__(self) -> None:
        self._records = _WeakRecords()

    def of(self, module: nn.Module) -> Arguments | None:
        """The arguments of `module`; `None` if it was not built in the block, or an argument is a module now gone."""
        return self._records.get(module)

    def __len__(self) -> int:
        return len(self._records)


@contextmanager
def recorded() -> Iterator[Recording]:
    """Records the constructor arguments of every module that this thread builds inside the block.

    A model built in it can be grafted with layouts that take the original's arguments:

        with kernelgraft.recorded():
            model = MyModel(hidden_size=64)

    Blocks nest, and profilers and tracers that run already go on running.

    Raises:
        GraftError: Before Python 3.12: a profiler written in C and a tracer (a debugger, `coverage`) are both running,
            so there is nothing left to listen through; or the profile function was replaced inside the block, so that
            the record has holes.
    """
    recording = Recording()
    with inits_heard(partial(_note, (recording._records, _of_live_modules))):
        yield recording


def arguments_of(module: nn.Module) -> Arguments | None:
    """The arguments of a module that was built inside any `recorded()` block, or `None`."""
    return _of_live_modules.get(module)


class Signatures:
    """Signatures of modules' `__init__` without `self`, each read once."""

    def __init__(self) -> None:
        self._read: dict[type[nn.Module], inspect.Signature] = {}

    def of(self, module_class: type[nn.Module]) -> inspect.Signature:
        """The signature for `module_class(...)`."""
        if module_class not in self._read:
            self._read[module_class] = inspect.Signature(_parameters(module_class))
        return self._read[module_class]


def bind_arguments(
    layout_class: type[nn.Module],
    arguments: Arguments,
    original_class: type[nn.Module],
    signatures: Signatures | None = None,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The original's arguments as the layout's `__init__` takes them: by name, and by position where names differ.

    What the layout does not take is left out if it equals the original's default or is `None`. A layout parameter with
    a default gets a value by name only: by position nobody can tell the original's `eps` under another name from a
    parameter of the layout's own.

    Args:
        layout_class: The layout's class.
        arguments: What the original's `__init__` got.
        original_class: The original's class.
        signatures: Those read so far, for a caller that has many sites.

    Returns:
        `args` and `kwargs` for `layout_class(*args, **kwargs)`.

    Raises:
        PlanError: The layout needs an argument that the original does not have, or does not take one that matters.
    """

    def refused(problem: str, advice: str) -> PlanError:
        return PlanError(
            f"{layout_class.__name__} {problem}. "
            f"The layout: {layout_class.__name__}{layout_signature}; "
            f"the original: {original_class.__name__}{original_signature}, built with "
            f"({', '.join((f'{each.name}=' if each.name else '') + _short(each.value) for each in given)}). "
            f"{advice}, or define from_module(module) on the layout."
        )

    signatures = signatures or Signatures()
    layout_signature, original_signature = signatures.of(layout_class), signatures.of(original_class)
    given = _given(original_signature, arguments)
    positional = [each for each in given if each.positional]
    by_name = {each.name: each for each in given if each.name is not None}
    parameters = list(layout_signature.parameters.values())
    kinds = {parameter.kind for parameter in parameters}
    takes_more_args, takes_more_kwargs = inspect.Parameter.VAR_POSITIONAL in kinds, _VAR_KEYWORD in kinds
    parameters = [each for each in parameters if each.kind not in (inspect.Parameter.VAR_POSITIONAL, _VAR_KEYWORD)]
    layout_names = {parameter.name for parameter in parameters}

    taken: dict[str, _Given] = {}
    for index, parameter in enumerate(parameters):
        if parameter.name in by_name:
            taken[parameter.name] = by_name[parameter.name]
            continue
        opposite = None
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY and index < len(positional):
            opposite = positional[index] if positional[index].name not in layout_names else None
        if opposite is not None and (parameter.default is _EMPTY or opposite.name is None):
            taken[parameter.name] = opposite
        elif opposite is not None and opposite.value is not None and not takes_more_kwargs:
            raise refused(
                f"has no {opposite.name!r}, and whether its {parameter.name!r} is the same cannot be told",
                f"Call it {opposite.name!r}, or make {parameter.name!r} keyword-only to say that it is another one",
            )
        elif parameter.default is _EMPTY:
            raise refused(
                f"needs {parameter.name!r}, which {original_class.__name__} does not have", "Give it a default"
            )

    more_args: list[Any] = []
    more_kwargs: dict[str, Any] = {}
    used = {id(each) for each in taken.values()}
    for each in given:
        if id(each) in used:
            continue
        if each.positional and takes_more_args:
            more_args.append(each.value)
        elif each.name is not None and takes_more_kwargs:
            more_kwargs[each.name] = each.value
        elif each.value is not None and not _same(each.value, each.default):
            what = repr(each.name) if each.name is not None else "an argument"
            raise refused(f"does not take {what} = {_short(each.value)}", "Take it")
    return _call_form(parameters, taken, more_args, more_kwargs)


# Recording


class _WeakRecords:
    """Arguments by module identity, which holds neither the modules nor modules among their arguments alive.

    Identity, because a module may define `__eq__` without `__hash__` (a dataclass does). Modules among the arguments
    are held weakly, because a child that was given its parent would keep itself alive through its own record.
    """

    def __init__(self) -> None:
        self._entries: dict[int, tuple[weakref.ref[nn.Module], Any, Any]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def knows(self, module: nn.Module) -> bool:
        """Whether the arguments of `module` are noted."""
        entry = self._entries.get(id(module))
        return entry is not None and entry[0]() is module

    def get(self, module: nn.Module) -> Arguments | None:
        entry = self._entries.get(id(module))
        if entry is None or entry[0]() is not module:
            return None
        try:
            return Arguments(_recalled(entry[1]), _recalled(entry[2]))
        except ReferenceError:
            return None

    def add(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Note what `_kept` made of a module's arguments, if none are known yet."""
        if self.knows(module):
            return
        entries, key = self._entries, id(module)

        def forget(gone: weakref.ref[nn.Module]) -> None:
            entry = entries.get(key)
            if entry is not None and entry[0] is gone:
                del entries[key]

        entries[key] = (weakref.ref(module, forget), args, kwargs)


_of_live_modules = _WeakRecords()


class _WeakModule:
    def __init__(self, module: nn.Module) -> None:
        self.ref = weakref.ref(module)


class _Container:
    def __init__(self, of: type, content: Any) -> None:
        self.of: Callable[[Any], Any] = of
        self.content = content


_PLAIN = frozenset({int, float, str, bool, type(None), torch.dtype, torch.device})
_CONTAINERS = frozenset({list, tuple, dict, OrderedDict})


def _kept(value: Any) -> Any:
    """`value` with weak references for the modules in it; itself, the same object, where there are none."""
    kind = type(value)  # and not isinstance, which asks an object for its class: a config looks that up in Python
    if kind in _PLAIN or (kind in _CONTAINERS and not value):
        return value
    if issubclass(kind, nn.Module):
        return _WeakModule(value)
    if kind in (list, tuple):
        items = [_kept(item) for item in value]
        return value if all(map(operator.is_, items, value)) else _Container(kind, items)
    if kind in (dict, OrderedDict):
        items = [_kept(item) for item in value.values()]
        if all(map(operator.is_, items, value.values())):
            return value
        return _Container(kind, list(zip(value, items, strict=True)))
    return value


def _recalled(value: Any) -> Any:
    if isinstance(value, _WeakModule):
        module = value.ref()
        if module is None:
            raise ReferenceError
        return module
    if isinstance(value, _Container):
        if value.of in (list, tuple):
            return value.of(_recalled(item) for item in value.content)
        return value.of((key, _recalled(item)) for key, item in value.content)
    return value


def _note(into: tuple[_WeakRecords, ...], frame: FrameType) -> None:
    code, variables = frame.f_code, frame.f_locals
    if code.co_argcount:
        first: Any = variables.get(code.co_varnames[0])
        if not issubclass(type(first), nn.Module):
            return
        # The outermost __init__ came first: those of the bases, half of all, find the module here.
        for records in into:
            if not records.knows(first):
                break
        else:
            return
    call = _call_of(code, variables)
    if call is None or not issubclass(type(call[0]), nn.Module):
        return
    module = call[0]
    # A wrapped __init__ starts in a frame of another name, and a block inside an __init__ starts in the middle of one.
    code = getattr(type(module).__init__, "__code__", frame.f_code)
    outer = frame.f_back if code is not frame.f_code else None
    while outer is not None:
        whole = _call_of(code, outer.f_locals) if outer.f_code is code else None
        if whole is not None and whole[0] is module:
            call = whole
            break
        outer = outer.f_back
    args, kwargs = _kept(call[1]), _kept(call[2])
    for records in into:
        records.add(module, args, kwargs)


def _call_of(code: CodeType, variables: Mapping[str, Any]) -> tuple[Any, tuple[Any, ...], dict[str, Any]] | None:
    """The first argument of a call, its other positional ones, and the keywords; `variables` are its frame's locals."""
    names, flags = code.co_varnames, code.co_flags
    num_args, num_named = code.co_argcount, code.co_argcount + code.co_kwonlyargcount
    try:
        args = tuple([variables[name] for name in names[:num_args]])
        kwargs = {name: variables[name] for name in names[num_args:num_named]} if num_named > num_args else {}
        if flags & inspect.CO_VARARGS:
            args += tuple(variables[names[num_named]])
            num_named += 1
        if flags & inspect.CO_VARKEYWORDS:
            kwargs.update(variables[names[num_named]])
    except (KeyError, TypeError, ValueError):  # the frame is no longer at its start, and has reused the names
        return None
    return (args[0], args[1:], kwargs) if args else None


# Binding


_BY_POSITION = inspect.Parameter.POSITIONAL_OR_KEYWORD
_VAR_KEYWORD = inspect.Parameter.VAR_KEYWORD


@dataclass(frozen=True, eq=False)
class _Given:
    name: str | None  # None: it came in through *args
    value: Any
    default: Any
    positional: bool


def _parameters(module_class: type[nn.Module]) -> list[inspect.Parameter]:
    """Parameters of the class's `__init__` without `self`."""
    if module_class.__init__ is nn.Module.__init__:  # its *args and **kwargs are for a message: it takes nothing
        return []
    parameters = list(inspect.signature(module_class.__init__).parameters.values())
    if parameters and parameters[0].kind is not inspect.Parameter.VAR_POSITIONAL:
        del parameters[0]
    return parameters


def _given(original: inspect.Signature, arguments: Arguments) -> list[_Given]:
    parameters = original.parameters.values()
    all_given = len(arguments.args) == len(parameters) and not arguments.kwargs
    if all_given and all(each.kind is _BY_POSITION for each in parameters):
        pairs = zip(parameters, arguments.args, strict=True)
        return [_Given(each.name, value, each.default, True) for each, value in pairs]
    try:
        bound = original.bind(*arguments.args, **arguments.kwargs)
    except TypeError:  # a decorated __init__ whose inner signature is not that of the call
        positional = [_Given(None, value, _EMPTY, True) for value in arguments.args]
        return positional + [_Given(name, value, _EMPTY, False) for name, value in arguments.kwargs.items()]
    bound.apply_defaults()
    given = []
    for parameter in parameters:
        value = bound.arguments[parameter.name]
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            given += [_Given(None, each, _EMPTY, True) for each in value]
        elif parameter.kind is _VAR_KEYWORD:
            given += [_Given(name, each, _EMPTY, False) for name, each in value.items()]
        else:
            positional_too = parameter.kind is not inspect.Parameter.KEYWORD_ONLY
            given.append(_Given(parameter.name, value, parameter.default, positional_too))
    return given


def _same(value: Any, default: Any) -> bool:
    if value is default:
        return True
    if type(value) is not type(default) or isinstance(value, torch.Tensor):
        return False
    try:
        return bool(value == default)
    except Exception:  # an __eq__ that gives no truth value, as numpy's
        return False


def _short(value: Any) -> str:
    """A value in a message: a config, say, by its class."""
    text = repr(value)
    return text if len(text) <= 80 and "\n" not in text else f"<{type(value).__name__}>"


def _call_form(
    parameters: list[inspect.Parameter], taken: dict[str, _Given], more_args: list[Any], more_kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    positional = [each for each in parameters if each.kind is not inspect.Parameter.KEYWORD_ONLY]
    # What comes after a gap goes by keyword, unless it cannot: then the gap is filled with the layout's own default.
    must = len(positional) if more_args else 0
    for index, parameter in enumerate(positional):
        if parameter.kind is inspect.Parameter.POSITIONAL_ONLY and parameter.name in taken:
            must = max(must, index + 1)
    args: list[Any] = []
    for index, parameter in enumerate(positional):
        if parameter.name not in taken and index >= must:
            break
        args.append(taken[parameter.name].value if parameter.name in taken else parameter.default)
    in_args = {each.name for each in positional[: len(args)]}
    kwargs = {name: each.value for name, each in taken.items() if name not in in_args}
    return (*args, *more_args), {**kwargs, **more_kwargs}
