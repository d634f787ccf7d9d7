"""What can be read off a repository's code without running it."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from kernelgraft.authoring.findings import Finding
from kernelgraft.authoring.repository import Repository

_ALLOWED = {"torch", "triton"}
_SIZES = re.compile(
    r"(hidden|intermediate|embed|model|vocab)_(size|dim)|num_(attention_|key_value_|local_)?(heads|experts)"
    r"|(in|out)_features|inner_dim"
)
_INTERFACE = "_attn_implementation"
"""What every attention of Transformers asks its config for; it is no size."""
_MISSING_MODULE = {"ImportError", "ModuleNotFoundError", "Exception"}


def check_code(repository: Repository) -> Iterator[Finding]:
    """All that is found in the files of a repository."""
    for path in repository.sources():
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        except SyntaxError:
            continue  # its import says so
        yield from check_imports(tree, path, repository)
        yield from check_sizes(tree, path)


def check_imports(tree: ast.AST, path: Path, repository: Repository) -> Iterator[Finding]:
    """A kernel on the Hub imports torch, Triton, the standard library, and what its metadata may name."""
    declared = {known_dependencies()[name] for name in _declared(repository) if name in known_dependencies()}
    for node, guarded in _imports(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        if isinstance(node, ast.ImportFrom) and node.level:
            continue
        for name in names:
            root = name.partition(".")[0]
            where = f"{path}:{node.lineno}"
            if root == repository.package.name and not repository.in_build:
                yield Finding(
                    "imports",
                    f"imports its own package by name ({name}); a build is loaded under another one",
                    where,
                    "write `from . import ...`",
                )
            elif root not in sys.stdlib_module_names and root not in _ALLOWED | declared and not guarded:
                offered = [each for each, module in known_dependencies().items() if module == root]
                yield Finding(
                    "imports",
                    f"imports {name!r}, which is not there wherever a kernel of the Hub is loaded",
                    where,
                    f'write python-depends = ["{offered[0]}"] into build.toml'
                    if offered
                    else f"do without it, or import it inside `try: ... except ImportError` and work where {root} is "
                    f"missing",
                )


def check_sizes(tree: ast.AST, path: Path) -> Iterator[Finding]:
    """A forward reads sizes off tensors: a shard of a model has the config of the whole."""
    for cls, forward in forwards(tree):
        for node in ast.walk(forward):
            if not isinstance(node, ast.Attribute):
                continue
            of = node.value
            config = (isinstance(of, ast.Attribute) and of.attr == "config") or (
                isinstance(of, ast.Name) and of.id == "config"
            )
            own = isinstance(of, ast.Name) and of.id == "self" and _SIZES.fullmatch(node.attr)
            if (config and node.attr != _INTERFACE) or own:
                yield Finding(
                    "sizes",
                    f"{cls.name}.forward reads {ast.unparse(node)}, which is the size of the whole model and not that "
                    f"of a shard"
                    if _SIZES.fullmatch(node.attr)
                    else f"{cls.name}.forward reads {ast.unparse(node)}: a config says nothing about a shard",
                    f"{path}:{node.lineno}",
                    "read the size off a tensor, as `hidden_states.shape[-1]` or `self.up_proj.weight.shape[0]`; what "
                    "is no size, off the layout: `self.eps = ...` in its __init__",
                    "error" if _SIZES.fullmatch(node.attr) else "warning",
                )


def forwards(tree: ast.AST) -> Iterator[tuple[ast.ClassDef, ast.FunctionDef]]:
    """The forwards of the classes that are no layouts."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and not node.name.endswith("Layout"):
            for each in node.body:
                if isinstance(each, ast.FunctionDef) and each.name == "forward":
                    yield node, each


def names_read(repository: Repository, kernel: str) -> set[str]:
    """The plain names that a kernel's forward reads."""
    for path in repository.sources():
        for cls, forward in forwards(ast.parse(path.read_text(encoding="utf-8"))):
            if cls.name == kernel:
                loads = (n for n in ast.walk(forward) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load))
                return {node.id for node in loads}
    return set()


def known_dependencies() -> dict[str, str]:
    """What `python-depends` may name, and the module that it is imported as."""
    from kernels.python_deps import _DEPENDENCY_DATA

    tables = [_DEPENDENCY_DATA.general, *_DEPENDENCY_DATA.backends.values()]
    found = {}
    for table in tables:
        for name, info in table.items():
            found[name] = next((package.import_name for package in info.python if package.import_name), name)
    return found


def _declared(repository: Repository) -> list[str]:
    said = list(repository.general.get("python-depends", []))
    for table in repository.general.values():
        said += list(table.get("python-depends", [])) if isinstance(table, dict) else []
    return said


def _imports(tree: ast.AST, guarded: bool = False) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node, guarded
        elif isinstance(node, ast.Try) and any(map(_catches, node.handlers)):
            yield from _imports(ast.Module(node.body, []), True)
            rest = [*(each for handler in node.handlers for each in handler.body), *node.orelse, *node.finalbody]
            yield from _imports(ast.Module(rest, []), guarded)
        else:
            yield from _imports(node, guarded)


def _catches(handler: ast.ExceptHandler) -> bool:
    if handler.type is None:
        return True
    return any(isinstance(node, ast.Name) and node.id in _MISSING_MODULE for node in ast.walk(handler.type))
