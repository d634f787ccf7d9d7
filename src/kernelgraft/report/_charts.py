"""Charts as inline SVG that are as wide as the page: what lies along x is a share of the width, never a pixel.

Labels are HTML above each row, so that they wrap on a narrow screen and keep their size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kernelgraft.report._html import Html, joined, tag

_LOWEST, _HIGHEST = -2, 2
"""Powers of ten at the ends of the axis of errors: a hundredth of the limit, and a hundred times the limit."""


@dataclass(frozen=True)
class Bar:
    """One of two bars: its length, and the range that is drawn as a line over it, all in one unit."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Pair:
    """Original and grafted in one row: what is on the left of its label, and on the right."""

    label: Html
    figures: Html
    original: Bar
    grafted: Bar


@dataclass(frozen=True)
class Dots:
    """Shares of the limit in one row: of outputs and of gradients; `None` for what was not compared."""

    label: Html
    figures: Html
    output: float | None
    gradient: float | None


def bars(pairs: Sequence[Pair], note: str) -> Html:
    """Rows of two bars, each over its row's original, so that rows of very different sizes can be read together."""
    ends = [bar.high / pair.original.value for pair in pairs for bar in (pair.original, pair.grafted)]
    finite = [end for end in ends if math.isfinite(end)]
    top = max(1.25, math.ceil(max(finite, default=1) * 4) / 4)
    step = _step(top)
    ticks = [(index * step / top, f"{index * step:g}") for index in range(int(top / step) + 1)]
    rows = [
        tag(
            "div",
            _labels(pair.label, pair.figures),
            tag(
                "svg",
                _grid(ticks, strong="1"),
                _bar(pair.original, pair.original.value * top, 2, "original"),
                _bar(pair.grafted, pair.original.value * top, 17, "grafted"),
                class_="row",
                height=31,
                aria_hidden="true",
            ),
        )
        for pair in pairs
    ]
    legend = _legend(("original", "original"), ("grafted", "grafted"), note=note)
    return tag("div", legend, *rows, _axis(ticks), class_="chart")


def _step(top: float) -> float:
    """The distance of ticks from 0 to `top`: few enough to be read, and at least two."""
    if top <= 1.5:
        return 0.25
    power: float = 10.0 ** math.floor(math.log10(top / 6))
    return next(times * power for times in (1, 2, 5, 10) if times * power >= top / 6)


def dots(rows: Sequence[Dots]) -> Html:
    """Rows of dots on an axis by powers of ten, the limit in its middle."""
    powers = range(_LOWEST, _HIGHEST + 1)
    ticks = [(_along(10.0**power), "the limit" if power == 0 else f"{10.0**power:g}") for power in powers]
    drawn = [
        tag(
            "div",
            _labels(row.label, row.figures),
            tag(
                "svg",
                _grid(ticks, strong="the limit"),
                tag("line", x1=0, x2="100%", y1=9, y2=9, class_="grid"),
                _dot(row.output, "output"),
                _dot(row.gradient, "gradient"),
                class_="row",
                height=18,
                aria_hidden="true",
            ),
        )
        for row in rows
    ]
    return tag("div", *drawn, _axis(ticks), class_="chart")


def legend_of_dots() -> Html:
    """What the dots are."""
    note = "the worst error over what it may be; left of the limit is right"
    return _legend(("output", "outputs"), ("gradient", "gradients"), note=note)


def _legend(*series: tuple[str, str], note: str) -> Html:
    keys = [
        tag("span", tag("svg", _key(name), width=12, height=12, aria_hidden="true"), f" {text}", class_="key")
        for name, text in series
    ]
    return tag("p", *keys, tag("span", note), class_="legend")


def _key(name: str) -> Html:
    if name in ("original", "grafted"):
        return tag("rect", x=0, y=1, width=12, height=10, rx=2, class_=name)
    return _shape(name, "6", 6)


def _labels(left: Html, right: Html) -> Html:
    return tag("div", tag("span", left), tag("span", right, class_="figures"), class_="labels")


def _grid(ticks: Sequence[tuple[float, str]], strong: str) -> Html:
    return joined(
        *(
            tag("line", x1=_share(x), x2=_share(x), y1=0, y2="100%", class_="strong" if text == strong else "grid")
            for x, text in ticks
        )
    )


def _axis(ticks: Sequence[tuple[float, str]]) -> Html:
    anchors = ["start", *["middle"] * (len(ticks) - 2), "end" if ticks[-1][0] > 0.97 else "middle"]
    texts = [
        tag("text", text, x=_share(x), y=12, text_anchor=anchor)
        for (x, text), anchor in zip(ticks, anchors, strict=True)
    ]
    return tag("svg", *texts, class_="axis", height=18, aria_hidden="true")


def _bar(bar: Bar, full: float, y: int, name: str) -> Html:
    return joined(
        tag("rect", x=0, y=y, width=_share(bar.value / full), height=12, rx=2, class_=name),
        tag(
            "line",
            x1=_share(bar.low / full),
            x2=_share(bar.high / full),
            y1=y + 6,
            y2=y + 6,
            class_="range",
        ),
    )


def _dot(share: float | None, name: str) -> Html:
    return joined() if share is None else _shape(name, _share(_along(share)), 9)


def _shape(name: str, x: str, y: int) -> Html:
    """A disc for outputs and a ring for gradients, so that colour is not all that tells them apart."""
    return tag("circle", cx=x, cy=y, r=5 if name == "output" else 4, class_=name)


def _along(share: float) -> float:
    """Where a share of the limit lies on the axis, from 0 to 1; what is beyond an end lies a little before it."""
    if math.isnan(share):
        return 0.99
    power = math.log10(share) if 0 < share < math.inf else math.copysign(math.inf, share - 1)
    return min(max((power - _LOWEST) / (_HIGHEST - _LOWEST), 0.01), 0.99)


def _share(number: float) -> str:
    return f"{100 * number:.4g}%"
