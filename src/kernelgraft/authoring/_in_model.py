"""What shows only beside a model: signatures, keywords, rules, and what happens in a call."""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from kernelgraft.api import subject_of
from kernelgraft.authoring import _code, _trying
from kernelgraft.authoring.findings import Finding
from kernelgraft.authoring.repository import Repository
from kernelgraft.blueprint import Blueprint, Subject
from kernelgraft.choosing import Chooser
from kernelgraft.claims import Claims
from kernelgraft.config import Entry, KernelConfig, KernelReference
from kernelgraft.contents import Contents
from kernelgraft.errors import ConversionError, KernelGraftError, PlanError
from kernelgraft.kernel import Kernel
from kernelgraft.planner import make_blueprint
from kernelgraft.signature import renamed_keywords
from kernelgraft.soundness import calls_of

_RULES_FIX = "see `Rules` in docs/kernel-authors.md; `kernelgraft plan MODEL --kernels FILE` shows what they make"
# Why a kernel is not loaded, where a finding about its class or its module says so already.
_FOUND_IN_THE_CLASS = ("carries state", "has no forward", "importing it raised", "has no `layers`")
_SIGNATURE_FIX = "give the kernel's forward the parameters of the original's, by their names and in their order"


def check_in_model(repository: Repository, model: nn.Module, config: Any) -> tuple[list[Finding], list[str]]:
    """Look at the repository's kernels in the places that a config names.

    Returns:
        What is wrong, and what could not be looked at.
    """
    whole = KernelConfig.of(config)
    live = not any(parameter.is_meta for parameter in model.parameters())
    subject = subject_of(model, live=live)
    findings: list[Finding] = []
    not_checked: list[str] = []
    given = zip(whole.entries, whole.kernel_mapping.items(), strict=True)
    entries = [(entry, key, value) for entry, (key, value) in given if _is_of(repository, entry)]
    if not entries:
        not_checked.append(f"anything in the model: the config names no kernel of {repository.folder}")
    for entry, key, value in entries:
        # Each by itself, so that what is wrong with one does not hide what is wrong with another.
        single = KernelConfig([(key, value)], whole.use_local_kernel, inherit_mapping=False)
        found, left = _check_entry(repository, subject, entry, single)
        findings += found
        not_checked += left
    return findings, not_checked


def _is_of(repository: Repository, entry: Entry) -> bool:
    folder = repository.folder.resolve()
    uses = [choice.use for choice in entry.choices]
    return any(
        isinstance(use, KernelReference) and use.kind == "path" and use.path.resolve().is_relative_to(folder)
        for use in uses
    )


def _check_entry(
    repository: Repository, subject: Subject, entry: Entry, single: KernelConfig
) -> tuple[list[Finding], list[str]]:
    findings: list[Finding] = []
    try:
        sites = _sites(subject, entry)
    except KernelGraftError as error:
        known = any(words in str(error) for words in _FOUND_IN_THE_CLASS)
        return [] if known else [_finding(error, entry.label)], [f"{entry.label} in the model: it does not load yet"]
    calls = (
        {}
        if subject.run is None
        else calls_of(
            subject.skeleton if subject.skeleton is not None else subject.model,
            [path for _, path in sites],
            subject.run,
        )
    )
    refused = False
    for kernel, path in sites:
        for each in check_signature(repository, kernel, subject.model.get_submodule(path), path, calls.get(path)):
            findings.append(each)
            refused = refused or each.rule == "signature"
    blueprint: Blueprint | None = None
    try:
        blueprint = make_blueprint(subject, single)
    except KernelGraftError as error:
        # What the signature check has found in full is what a plan stops at.
        if not refused or "cannot stand for" not in str(error):
            findings.append(_finding(error, entry.label))
    if blueprint is None:
        return findings, [f"{entry.label}: torch.compile, fake tensors, backward: there is no plan to try them on"]
    findings += check_reversible(blueprint)
    left: list[str] = []
    if not calls:
        left.append(f"{entry.label}: what the model passes, torch.compile, fake tensors, backward: no call is known")
    tried: set[int] = set()
    for site in blueprint.sites:
        if site.site.kind not in tried and site.site.host in calls:
            tried.add(site.site.kind)
            found, skipped = _trying.try_site(subject.model, site, calls[site.site.host])
            findings += found
            left += skipped
    return findings, left


def _sites(subject: Subject, entry: Entry) -> list[tuple[Kernel, str]]:
    """Each kernel of an entry with the path of one module of each class that it would stand for."""
    device = torch.device("cpu")
    chooser = Chooser("error", "cpu", [])
    modules = dict(Contents(subject.model).modules)
    claims = Claims(modules, subject.prefix, [(entry, False)], chooser, device).collect()
    kernels = [kernel for _, _, kernel in chooser.modes(entry, device) or ()]
    found: dict[tuple[Kernel, type], str] = {}
    for kernel in dict.fromkeys(kernels):
        for want in claims:
            paths = want.claim.paths
            host = getattr(kernel.layout, "host", None)
            last = [path.rpartition(".")[2] for path in paths]
            path = paths[last.index(host)] if isinstance(host, str) and host in last else paths[0]
            found.setdefault((kernel, type(modules[path])), path)
    return [(kernel, path) for (kernel, _), path in found.items()]


def check_signature(
    repository: Repository, kernel: Kernel, original: nn.Module, path: str, call: Any
) -> Iterator[Finding]:
    """The kernel's forward takes what the original's takes, and uses what the model passes."""
    assert kernel.forward_class is not None
    name = kernel.name
    try:
        renames = renamed_keywords(kernel.forward_class, type(original))
    except PlanError as error:
        yield Finding("signature", str(error), path, _SIGNATURE_FIX)
        renames = {}
    ours = dict(list(inspect.signature(kernel.forward_class.forward).parameters.items())[1:])  # type: ignore[attr-defined]
    theirs = dict(list(inspect.signature(type(original).forward).parameters.items())[1:])
    if call is None or any(p.kind is p.VAR_POSITIONAL for p in (*ours.values(), *theirs.values())):
        return
    args, kwargs = call
    positional = [each for each, p in theirs.items() if p.kind is not p.KEYWORD_ONLY]
    passed: Mapping[str, Any] = {**dict(zip(positional, args, strict=False)), **kwargs}
    read = _code.names_read(repository, name)
    for keyword, value in passed.items():
        as_ours = renames.get(keyword, keyword)
        if value is None or keyword not in theirs:
            continue  # what the original itself takes in **kwargs may land there
        if as_ours not in ours:
            yield Finding(
                "keywords",
                f"the model passes {keyword!r} to {type(original).__name__}, and {name}.forward does not take it",
                path,
                f"take {keyword!r} as a parameter, and use it",
            )
        elif read and as_ours not in read:
            yield Finding(
                "keywords",
                f"the model passes {keyword!r} to {type(original).__name__}, and {name}.forward takes it and drops it",
                path,
                f"use {as_ours!r}, or refuse such calls: "
                f"`@staticmethod def supports(...): return {as_ours} is None or 'no {as_ours}'`",
            )


def check_reversible(blueprint: Blueprint) -> Iterator[Finding]:
    """The originals can be had back from what is packed, so that `state_dict()` and `remove()` work."""
    for kind in blueprint.plan.kinds:
        for name, why in kind.irreversible:
            yield Finding(
                "rules",
                f"{name} cannot be had back from what {kind.layout} packs: {why}",
                kind.target,
                "pack by moving elements only (concatenate, stack, transpose, reshape, slice); compute values in the "
                "forward, or list an original that is not needed in `dropped`",
            )


def _finding(error: KernelGraftError, place: str) -> Finding:
    text = str(error)
    if isinstance(error, ConversionError) or any(
        word in text for word in ("would be lost", "Nothing fills", "its rule makes", "The rules of", "packing")
    ):
        return Finding("rules", text, place, _RULES_FIX)
    if "cannot stand for" in text:
        return Finding("signature", text, place, _SIGNATURE_FIX)
    if "forward reads" in text:
        fix = "set what the forward reads in the layout's __init__"
        return Finding("attributes", text, place, fix)
    return Finding("plan", text, place, "as the message says")


__all__ = ["check_in_model", "check_reversible", "check_signature"]
