"""Code of a model's own classes, copied into a new repository together with the imports that it needs there."""

import ast
import builtins
import inspect
import sys
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import nn

_LONG = 110


@dataclass(frozen=True)
class Copy:
    """One method of a class.

    Attributes:
        source: Its text, from its decorators on, without indentation.
        arguments: Its parameters as they stand there, without `self`.
        call: What calls it with its own parameters.
        names: What it reads by name, and what that is.
        module: The module that it is from.
        reads: The attributes of `self` that it reads.
    """

    source: str
    arguments: str
    call: str
    names: dict[str, Any]
    module: str
    reads: frozenset[str]

    def indented(self) -> str:
        """The text as it stands in a class."""
        return textwrap.indent(self.source, "    ")


def copy_of(method: Callable[..., Any], *, calls_super: bool) -> Copy | None:
    """The text of a method; `None` if it cannot stand in another class.

    Args:
        method: The function.
        calls_super: Whether `super().__init__()` may stand in it. All else that asks for the base class stays there.
    """
    function = inspect.unwrap(method)
    try:
        source = textwrap.dedent(inspect.getsource(method))
        (node,) = ast.parse(source).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return None
    if not isinstance(node, ast.FunctionDef) or function.__module__ == "__main__":
        return None
    if set(function.__code__.co_freevars) - {"__class__"} or not _super_is_plain(node, calls_super):
        return None
    known = function.__globals__
    used = {each.id for each in ast.walk(node) if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Load)}
    names = {name: known[name] for name in sorted(used) if name in known and not hasattr(builtins, name)}
    given, call = _parameters(node.args)
    return Copy(source.rstrip(), given, call, names, function.__module__, frozenset(_reads(node)))


def _parameters(arguments: ast.arguments) -> tuple[str, str]:
    """How they are declared, and how they are handed on."""
    given = ast.unparse(arguments).partition(",")[2].strip()
    call = [each.arg for each in (*arguments.posonlyargs, *arguments.args)][1:]
    call += [f"*{arguments.vararg.arg}"] if arguments.vararg else []
    call += [f"{each.arg}={each.arg}" for each in arguments.kwonlyargs]
    call += [f"**{arguments.kwarg.arg}"] if arguments.kwarg else []
    return given, ", ".join(call)


def imports_of(copies: Iterable[Copy]) -> tuple[list[str], list[str]]:
    """Lines that import what copies read: of torch and the standard library, and of other packages."""
    plain: set[str] = set()
    of_module: defaultdict[str, set[str]] = defaultdict(set)
    others: defaultdict[str, set[str]] = defaultdict(set)
    for copy in copies:
        for name, value in copy.names.items():
            if isinstance(value, ModuleType):
                line = _module_import(name, value)
                (plain if _is_plain(value.__name__) else others[""]).add(line)
                continue
            module = str(getattr(value, "__module__", ""))
            if _is_plain(module) and getattr(sys.modules.get(module), name, None) is value:
                of_module[module].add(name)
            else:
                others[copy.module].add(name)
    lines = [_from(module, names) for module, names in of_module.items()]
    guarded = sorted(others.pop("", ()))
    guarded += [_from(module, names) for module, names in sorted(others.items())]
    return sorted((plain | set(lines)) - {"import torch", "from torch import nn"}), guarded


def _from(module: str, names: Iterable[str]) -> str:
    """An import of names, in lines that are not too long."""
    line = f"from {module} import {', '.join(sorted(names))}"
    if len(line) <= _LONG:
        return line
    listed = "".join(f"    {name},\n" for name in sorted(names))
    return f"from {module} import (\n{listed})"


def _module_import(name: str, module: ModuleType) -> str:
    parent, _, last = module.__name__.rpartition(".")
    if module.__name__ == name:
        return f"import {name}"
    return f"from {parent} import {last}" + (f" as {name}" if last != name else "")


def _is_plain(module: str) -> bool:
    root = module.partition(".")[0]
    return root == "torch" or (root in sys.stdlib_module_names and root != "__main__")


def _super_is_plain(node: ast.FunctionDef, calls_super: bool) -> bool:
    calls = [each for each in ast.walk(node) if _is_super(each)]
    return not calls or (calls_super and "super().__init__()" in ast.unparse(node) and len(calls) == 1)


def _is_super(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"


def _reads(node: ast.FunctionDef) -> Iterable[str]:
    for each in ast.walk(node):
        if isinstance(each, ast.Attribute) and isinstance(each.value, ast.Name) and each.value.id == "self":
            yield each.attr


@dataclass(frozen=True, eq=False)
class CopiedClass:
    """A class whose code a kernel can begin with.

    Attributes:
        cls: The class.
        forward: Its forward.
        init: Its `__init__`; `None` if that cannot stand in a layout, or if the forward reads what the class alone has.
        input: What the forward calls its first argument.
    """

    cls: type[nn.Module]
    forward: Copy
    init: Copy | None
    input: str


def copied_class(cls: type[nn.Module]) -> CopiedClass | None:
    """The class with its code, or `None` where the forward needs its base class, or cannot be read."""
    forward = copy_of(cls.forward, calls_super=False)
    arguments = list(inspect.signature(cls.forward).parameters)[1:]
    if forward is None or not arguments:
        return None
    own = set(dir(cls)) - set(dir(nn.Module))
    init = None if forward.reads & own else copied_init(cls)
    return CopiedClass(cls, forward, init, arguments[0])


def copied_init(cls: type[nn.Module]) -> Copy | None:
    """How a class is built, if a layout can be built so too: by a method that needs nothing else of the class."""
    init = copy_of(cls.__init__, calls_super=True)
    own = set(dir(cls)) - set(dir(nn.Module))
    return None if init is None or init.reads & own else init
