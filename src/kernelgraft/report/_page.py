"""The whole page: one HTML document that needs nothing beside it."""

from collections.abc import Iterable, Mapping
from importlib.resources import files
from typing import Any

from kernelgraft.benchmark.report import Report as Benchmark
from kernelgraft.plan import Plan
from kernelgraft.report._errors import verification_section
from kernelgraft.report._html import Html, joined, tag
from kernelgraft.report._model import left_section, parameters_section, tree_section
from kernelgraft.report._speed import benchmark_section, speedups_of_whole_model
from kernelgraft.report.marks import kernel_names
from kernelgraft.report.tree import ModelTree
from kernelgraft.verify.report import Report as Verification

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
"""What a browser may do with the page: nothing of another place, and no script."""


def page_of(
    plan: Plan,
    tree: ModelTree,
    verification: Verification | None,
    benchmark: Benchmark | None,
    environment: Mapping[str, Any],
) -> str:
    """The page as text; the same arguments give the same text."""
    sections = [
        ("plan", "Where kernels stand", joined(_kernels(plan), tree_section(plan, tree), left_section(plan))),
        ("parameters", "Parameters", parameters_section(plan, tree)),
        ("errors", "Equality with the original", _errors(verification)),
        ("speed", "Speed and memory", _speed(verification, benchmark)),
        ("environment", "Environment", _environment(environment)),
    ]
    links = [tag("a", title, href=f"#{anchor}") for anchor, title, _ in sections]
    body = tag(
        "main",
        tag(
            "header",
            tag("p", "kernelgraft report", class_="over"),
            tag("h1", plan.model),
            _tiles(plan, verification, benchmark),
            tag("nav", *links),
        ),
        *(tag("section", tag("h2", title), content, id=anchor) for anchor, title, content in sections),
    )
    style = Html(files("kernelgraft.report").joinpath("page.css").read_text(encoding="utf-8"))
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("title", f"{plan.model} with kernels"),
        tag("style", style),
    )
    return f"<!doctype html>\n{tag('html', head, tag('body', body), lang='en')}\n"


def _tiles(plan: Plan, verification: Verification | None, benchmark: Benchmark | None) -> Html:
    places = len(plan.sites) + sum(len(function.paths) for function in plan.functions)
    kinds = len(plan.kinds) + len(plan.functions)
    misses = len(plan.near_misses)
    tiles = [
        _tile(str(places), f"site{'s' * (places != 1)} of {kinds} kind{'s' * (kinds != 1)} on {plan.device}"),
        _tile(str(misses), f"near miss{'es' * (misses != 1)}"),
        _verdict_tile(verification),
        _speed_tile(benchmark),
    ]
    return tag("div", *tiles, class_="tiles")


def _tile(value: str, text: str, look: str = "") -> Html:
    return tag("div", tag("div", value, class_=f"value {look}".strip()), tag("div", text), class_="tile")


def _verdict_tile(verification: Verification | None) -> Html:
    if verification is None:
        return _tile("not verified", "equality was not looked at", "small")
    if verification.passed:
        return _tile("\N{CHECK MARK} passed", "equality with the original", "right small")
    count = len(verification.failures)
    return _tile("\N{BALLOT X} failed", f"{count} fault{'s' * (count != 1)} found", "wrong small")


def _speed_tile(benchmark: Benchmark | None) -> Html:
    if benchmark is None:
        return _tile("not timed", "speed was not measured", "small")
    whole = speedups_of_whole_model(benchmark)
    found = whole or [row.speedup for row in benchmark.rows]
    if not found:
        return _tile("not timed", "no row could be measured", "small")
    low, high = f"{min(found):.2f}x", f"{max(found):.2f}x"
    text = "as fast as the original, " + ("the whole model" if whole else "per site")
    return _tile(low if low == high else f"{low} to {high}", text, "small")


def _kernels(plan: Plan) -> Html:
    """Which kernels there are, and where each comes from."""
    rows = [
        (kernel_names(kind.kernels), " + ".join(kind.classes), kind.kernels, sum(s.kind == index for s in plan.sites))
        for index, kind in enumerate(plan.kinds)
    ]
    rows += [
        (kernel_names(each.kernels), f"{each.replaces}()", each.kernels, len(each.paths)) for each in plan.functions
    ]
    if not rows:
        return tag("p", "No kernel is put into this model.")
    head = tag("tr", *(tag("th", text) for text in ("kernel", "in the place of", "sites", "from", "digest")))
    body = [
        tag(
            "tr",
            tag("td", tag("strong", name)),
            tag("td", original),
            tag("td", count, class_="number"),
            tag("td", *(tag("div", tag("code", text)) for text in _unique(use.reference or "a class" for use in uses))),
            tag(
                "td", *(tag("div", tag("code", text[:12], title=text)) for text in _unique(use.digest for use in uses))
            ),
        )
        for name, original, uses, count in rows
    ]
    return tag("div", tag("table", tag("thead", head), tag("tbody", *body)), class_="scroll")


def _unique(texts: Iterable[str]) -> list[str]:
    return [text for text in dict.fromkeys(texts) if text]


def _errors(verification: Verification | None) -> Html:
    if verification is None:
        return tag("p", "Not looked at.")
    return verification_section(verification)


def _speed(verification: Verification | None, benchmark: Benchmark | None) -> Html:
    if benchmark is not None:
        return benchmark_section(benchmark)
    failed = verification is not None and not verification.passed
    return tag("p", "Not measured: what verification has not passed is not timed." if failed else "Not measured.")


def _environment(environment: Mapping[str, Any]) -> Html:
    rows = [tag("tr", tag("th", name), tag("td", _value(value))) for name, value in environment.items()]
    return tag("div", tag("table", tag("tbody", *rows)), class_="scroll")


def _value(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)
