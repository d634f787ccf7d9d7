"""All that loaded modules of Transformers, `kernels` and `torch.nn` hold, to show that nothing of it has changed."""

import sys
import types

LIBRARIES = ("transformers", "kernels", "torch.nn.modules", "torch.nn.functional")
_MISSING = object()


class Snapshot:
    """What every attribute of every loaded module of these libraries is.

    With them goes what hangs on them, as deep as it goes: the attributes of the classes defined there, the contents of
    dicts, lists, tuples and sets, and the attributes of objects of the libraries' own (auto mappings, registries). All
    of it is held, so that an identity means what it says.
    """

    def __init__(self):
        self.holders = {}
        for name, module in list(sys.modules.items()):
            if _is_theirs(name):
                members = {key: value for key, value in vars(module).items() if not _is_import_machinery(key)}
                self._add(name, module, members)

    def _add(self, label, holder, members):
        self.holders[id(holder)] = (label, holder, members)
        for name, value in members.items():
            if id(value) not in self.holders and (inner := _members(value)) is not None:
                self._add(f"{label} > {name}", value, inner)

    def changes(self):
        """Every difference between now and then, but for what importing one more module adds."""
        now = Snapshot().holders
        lines = []
        for key, (label, holder, before) in self.holders.items():
            after = now[key][2] if key in now else _members(holder)
            for name in before.keys() | after.keys():
                old, new = before.get(name, _MISSING), after.get(name, _MISSING)
                if old is not new and not (old is _MISSING and _is_import(holder, name, new)):
                    said = ["nothing" if value is _MISSING else repr(value)[:80] for value in (old, new)]
                    lines.append(f"{label} > {name}: {said[0]} -> {said[1]}")
        return sorted(lines)


def _is_theirs(module_name):
    return any(f"{module_name}.".startswith(f"{library}.") for library in LIBRARIES)


def _members(value):
    """What can change inside `value` without its becoming another object, by name, key or position; else `None`."""
    if isinstance(value, types.ModuleType):
        return None
    if isinstance(value, type):
        return dict(vars(value)) if _is_theirs(value.__module__) else None
    found = None
    if isinstance(value, dict):
        found = dict(dict.items(value))  # a lazy mapping's own items() imports what it names
    elif isinstance(value, list | tuple):
        found = dict(enumerate(value))
    elif isinstance(value, set | frozenset):
        found = {element: element for element in value}
    if _is_theirs(type(value).__module__) or isinstance(value, types.FunctionType):
        found = (found or {}) | {f".{name}": each for name, each in getattr(value, "__dict__", {}).items()}
    return found


def _is_import_machinery(name):
    return name.startswith("__") and name != "__getattr__"


def _is_import(holder, name, value):
    """Whether an addition to `holder` is a module that was imported, or what a lazy package took from one."""
    if isinstance(value, types.ModuleType):
        return _is_theirs(value.__name__)
    return isinstance(holder, types.ModuleType) and name in getattr(holder, "_class_to_module", ())
