"""Where in a model the modules are that a new kernel is for."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from kernelgraft.authoring.copying import CopiedClass, copied_class
from kernelgraft.authoring.members import KINDS, Member, recognize
from kernelgraft.contents import Contents, joined
from kernelgraft.errors import AuthoringError
from kernelgraft.matching import answers_to, collapse_paths, find_modules, no_module_message
from kernelgraft.soundness import FusionSite, check_soundness, forward_runner


@dataclass(frozen=True)
class Place:
    """The modules that one kernel takes over.

    Attributes:
        names: Their class names as they were asked for, in the order in which data flows through them.
        patterns: A path pattern for each, for a fusion; empty for a single module.
        children: What their parents call them; of a single module "" where they do not agree.
        members: What each of them computes.
        cls: The class of a single module.
        copied: Its code, if what it computes is not known here.
    """

    names: tuple[str, ...]
    patterns: tuple[str, ...]
    children: tuple[str, ...]
    members: tuple[Member, ...]
    cls: type[nn.Module] | None = None
    copied: CopiedClass | None = None


def single_place(model: nn.Module, name: str) -> Place:
    """The modules whose class answers to `name`.

    Raises:
        AuthoringError: There is none, or what they compute is not known here and their code cannot be copied.
    """
    modules = dict(Contents(model).modules)
    paths = [claim.paths[0] for claim in find_modules(modules, name)]
    if not paths:
        raise AuthoringError(no_module_message(modules, name, ()))
    by_class = {type(modules[path]): path for path in reversed(paths)}
    found = {path: _member_or_code(modules[path], path) for path in by_class.values()}
    members = list(dict.fromkeys(found.values()))
    if len(members) > 1:
        said = ", ".join(f"{type(modules[path]).__name__} ({path})" for path in found)
        raise AuthoringError(
            f"{name!r} means classes that compute different things in this model: {said}. Name one of the classes: "
            f"--replaces {type(modules[paths[0]]).__name__}."
        )
    last = {path.rpartition(".")[2] for path in paths}
    child = (last.pop() if len(last) == 1 else "",)
    member, cls = members[0], next(iter(by_class))
    if isinstance(member, CopiedClass):
        return Place((name,), (), child, (), cls, member)
    return Place((name,), (), child, (member,), cls)


def fusion_place(model: nn.Module, names: Sequence[str], children: Sequence[str] = ()) -> Place:
    """The children of one kind of parent through which data flows one after the other, and nowhere else.

    Args:
        model: The model; nothing of it is called.
        names: Class names in the order in which data flows.
        children: What the parent calls them, where more than one choice would do.

    Raises:
        AuthoringError: No such chain is there, there are several, or what a member computes is not known here.
    """
    modules = dict(Contents(model).modules)
    chains: dict[tuple[str, ...], tuple[str, ...]] = {}
    for paths in _chains(modules, names):
        chains.setdefault(tuple(map(_pattern, paths)), paths)
    if children:
        kept = {k: v for k, v in chains.items() if tuple(path.rpartition(".")[2] for path in k) == tuple(children)}
        if not kept:
            raise AuthoringError(
                f"No parent has children {', '.join(children)} that are {', '.join(names)}. {_listed(chains)}"
            )
        chains = kept
    if not chains:
        kinds = sorted({type(module).__name__ for module in modules.values()})
        raise AuthoringError(
            f"No module of {type(model).__name__} has children that are {', '.join(names)}. Its classes are "
            f"{', '.join(kinds)}; a name may leave out what these begin with, as RMSNorm does for LlamaRMSNorm."
        )
    sound = _sound(model, chains)
    if len(sound) > 1:
        choices = " or ".join(f"--at {','.join(path.rpartition('.')[2] for path in patterns)}" for patterns in sound)
        raise AuthoringError(f"{' + '.join(names)} can be fused at more than one place. Choose: {choices}.")
    ((patterns, paths),) = sound.items()
    members = tuple(_member(modules[path], path) for path in paths)
    return Place(tuple(names), patterns, tuple(path.rpartition(".")[2] for path in paths), members)


def _chains(modules: Mapping[str, nn.Module], names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    for parent, module in modules.items():
        held = [(joined(parent, name), child) for name, child in module.named_children()]
        by_name = [[path for path, child in held if answers_to(type(child), name)] for name in names]
        for paths in itertools.product(*by_name):
            if len(set(paths)) == len(paths):
                yield paths


def _sound(
    model: nn.Module, chains: Mapping[tuple[str, ...], tuple[str, ...]]
) -> dict[tuple[str, ...], tuple[str, ...]]:
    run, sound, reasons = forward_runner(model), {}, []
    for patterns, paths in chains.items():
        site = FusionSite(paths[0].rpartition(".")[0], paths, paths[0])
        verdict = check_soundness(model, [site], run, live=False)[site]
        if verdict.sound is False:
            reasons.append(f"{' + '.join(patterns)}: {verdict.reason}")
        else:
            sound[patterns] = paths
    if not sound:
        raise AuthoringError(
            "A fused kernel gives only its own output, so each member's output must go to the next one and nowhere "
            f"else. That holds nowhere in {type(model).__name__}:\n  " + "\n  ".join(reasons)
        )
    return sound


def _pattern(path: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in path.split("."))


def _listed(chains: Mapping[tuple[str, ...], object]) -> str:
    there = [",".join(path.rpartition(".")[2] for path in patterns) for patterns in chains]
    return f"There is --at {' or --at '.join(there)}." if there else "There is no such group."


def _member_or_code(module: nn.Module, path: str) -> Member | CopiedClass:
    return recognize(module) or copied_class(type(module)) or _member(module, path)


def _member(module: nn.Module, path: str) -> Member:
    found = recognize(module)
    if found is None:
        raise AuthoringError(
            f"{type(module).__name__} at {collapse_paths([path])!r} is none of what `new` can write out as a working "
            f"kernel: {KINDS} that takes one tensor, or for --replaces a module whose code can be copied. Write the "
            f"forward yourself, with the original's parameters as `self`: see docs/kernel-authors.md."
        )
    return found
