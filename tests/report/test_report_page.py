"""The report as one HTML file: what it says, that it needs nothing else, and that the same data gives the same text."""

import dataclasses
import importlib.metadata
import json
import re
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

import kernelgraft
import toys
from kernelgraft import Kernel, report
from kernelgraft.errors import ReportError
from kernelgraft.matching import NearMiss
from kernelgraft.plan import Rejected
from kernelgraft.report._charts import _step

KERNELS = {
    "Norm": Kernel(toys.FastNorm, toys.FastNormLayout),
    toys.FUSION: Kernel(toys.NormMLP, toys.NormMLPLayout),
}
ENVIRONMENT = {"torch": "2.0", "devices": ["a <card>", "b"], "triton": None}
NO_CLOSE = {"meta", "br", "hr"}


class Wrong(nn.Module):
    def forward(self, hidden_states):
        return 2 * toys.FastNorm.forward(self, hidden_states)


def grafted(kernels=KERNELS, **sizes):
    return kernelgraft.graft(toys.model(**sizes), kernels, example_inputs=toys.inputs())


@dataclasses.dataclass
class Element:
    name: str
    attributes: dict
    text: str = ""
    children: list = dataclasses.field(default_factory=list)

    def all(self, name=None, class_=None):
        """Everything inside, this first, that has this name and this class."""
        classes = (self.attributes.get("class") or "").split()
        if name in (None, self.name) and (class_ is None or class_ in classes):
            yield self
        for child in self.children:
            yield from child.all(name, class_)


class Tree(HTMLParser):
    """A document as a tree; each element's text is all that is in it."""

    def __init__(self, text):
        super().__init__()
        self.open = [Element("", {})]
        self.feed(text)
        assert [each.name for each in self.open] == [""], "an element was never closed"
        self.root = self.open[0]

    def handle_starttag(self, tag, attrs):
        element = Element(tag, dict(attrs))
        self.open[-1].children.append(element)
        if tag not in NO_CLOSE:
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open.pop().name == tag

    def handle_data(self, data):
        for each in self.open:
            each.text += data


def parsed(text):
    return Tree(text).root


def section(text, name):
    return next(each for each in parsed(text).all("section") if each.attributes["id"] == name)


@pytest.fixture(scope="module")
def graft():
    return grafted()


@pytest.fixture(scope="module")
def verification(graft):
    return graft.verify(toys.inputs())


@pytest.fixture(scope="module")
def benchmark(graft, verification):
    return graft.benchmark(toys.inputs(), tokens=(1, 6), repeats=2, verified=verification)


@pytest.fixture(scope="module")
def page(graft, verification, benchmark):
    return report.page(graft.plan, graft.model, verification=verification, benchmark=benchmark, environment=ENVIRONMENT)


def test_a_grafted_model_has_the_tree_of_the_untouched_one():
    model = toys.model()
    before = report.tree_of(model)
    assert before.num_tensors == len(list(model.parameters()))
    assert before.num_elements == sum(parameter.numel() for parameter in model.parameters())
    with kernelgraft.graft(model, KERNELS, example_inputs=toys.inputs()):
        assert report.tree_of(model) == before
    with torch.device("meta"):
        assert report.tree_of(toys.Model()) == before


def test_shared_parameters_count_once():
    model = toys.model()
    model.layers[1].norm.weight = model.layers[0].norm.weight
    assert report.tree_of(model).num_tensors == len(list(model.parameters()))


def test_places_of_kernels_are_marked_in_the_tree(page):
    rows = [
        (row.text.split()[0], [each.text for each in row.all(class_="badge")])
        for row in section(page, "plan").all()
        if row.name == "summary" or row.attributes.get("class") == "leaf"
    ]
    assert rows == [
        ("Model", []),
        ("layers", []),
        ("{0..1}", []),
        ("norm", ["NormMLP"]),
        ("mlp", ["in NormMLP"]),
        ("w1", []),
        ("w2", []),
        ("w3", []),
        ("norm", ["FastNorm"]),
    ]


def test_layers_that_differ_are_not_written_as_one():
    names = (("Norm", "layers.1.norm"), ("MLP", "layers.1.mlp"))
    graft = grafted({names: KERNELS[toys.FUSION]}, num_layers=4)
    tree = section(report.page(graft.plan, graft.model), "plan")
    rows = [each.text.split()[0] for each in tree.all("summary")]
    assert rows == ["Model", "layers", "{0,2..3}", "mlp", "1", "mlp"]


def test_near_misses_and_entries_that_were_left_are_listed_and_marked(graft):
    plan = dataclasses.replace(
        graft.plan,
        near_misses=(NearMiss("norm", "Norm", "RMSNorm", "it is called otherwise"),),
        rejected=(Rejected("MLP", "layers.0.mlp", "no room"), Rejected("Rotary", "", "no such function")),
    )
    found = section(report.page(plan, graft.model), "plan")
    assert [each.text for each in found.all(class_="miss")] == ["near miss"]
    assert [each.text for each in found.all("li") if "at" in each.text or "Rotary" in each.text][-3:] == [
        "Norm for RMSNorm at norm: it is called otherwise",
        "MLP at layers.0.mlp: no room",
        "Rotary: no such function",
    ]


def test_parameters_before_and_after(page):
    found = section(page, "parameters")
    rows = [[cell.text for cell in row.all("td")] for row in found.all("tr")]
    assert ["scale", "8", "norm.weight", "norm.weight 8"] in rows
    packed = next(row for row in rows if row and row[0] == "w12")
    assert packed[1:3] == [
        "24 \N{MULTIPLICATION SIGN} 8".replace(" ", "\xa0"),
        "cat(mlp.w1.weight, mlp.w2.weight, dim=0)",
    ]
    assert packed[3].count("12\xa0\N{MULTIPLICATION SIGN}\xa08") == 2
    assert "9 tensors, the grafted one has them in 7" in found.text


def test_every_site_that_was_tried_has_its_errors(page, verification):
    found = section(page, "errors")
    labels = [each.children[0].children[0].text for each in found.all(class_="labels")]
    assert sorted(labels) == sorted(site for kind in verification.kinds for site in kind.tried)
    assert len(list(found.all("circle", "output"))) >= len(labels)
    assert "Passed" in found.text
    assert len(labels) == 3


def test_a_fault_is_named_and_nothing_is_timed():
    graft = grafted({"Norm": Kernel(Wrong, toys.FastNormLayout)})
    verification = graft.verify(toys.inputs(), every_site=False)
    page = report.page(graft.plan, graft.model, verification=verification)
    found = section(page, "errors")
    failures = next(found.all(class_="failures"))
    assert verification.failures[0].fault in failures.text
    assert verification.failures[0].site in failures.text
    assert "wrong at" in found.text
    assert "not timed" in section(page, "speed").text
    assert [each.text for each in parsed(page).all(class_="value")][2] == "\N{BALLOT X} failed"


def test_speed_has_two_bars_for_each_measurement(page, benchmark):
    found = section(page, "speed")
    charts = list(found.all(class_="row"))
    assert len(charts) == len(benchmark.rows) > 0
    assert all(len(list(each.all("rect"))) == 2 for each in charts)
    for row in benchmark.rows:
        assert f"{row.speedup:.2f}x" in found.text


def test_memory_has_bars_where_it_was_measured(graft, benchmark):
    first, second, *others = benchmark.rows
    rows = (with_peaks(first, 2000, 1500), with_peaks(second, 0, 10), *(with_peaks(row, None, None) for row in others))
    changed = dataclasses.replace(benchmark, rows=rows)
    found = section(report.page(graft.plan, graft.model, benchmark=changed), "speed")
    assert len(list(found.all(class_="row"))) == len(rows) + 1
    assert "2 kB \N{RIGHTWARDS ARROW} 1.5 kB 75%" in found.text


def with_peaks(row, original, grafted):
    return dataclasses.replace(
        row,
        original=dataclasses.replace(row.original, peak_bytes=original),
        grafted=dataclasses.replace(row.grafted, peak_bytes=grafted),
    )


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e30, float("inf"), float("nan")])
def test_any_figure_stays_in_the_chart(graft, verification, value):
    checks = tuple(
        dataclasses.replace(check, figures=tuple(dataclasses.replace(each, largest=value) for each in check.figures))
        for check in verification.checks
    )
    page = report.page(graft.plan, graft.model, verification=dataclasses.replace(verification, checks=checks))
    places = [float(each.attributes["cx"].rstrip("%")) for each in section(page, "errors").all("circle", "output")][1:]
    assert places
    assert all(0 < place < 100 for place in places)
    assert all(place > 50 for place in places) == (not value < 1)


def test_nothing_is_said_of_what_was_not_looked_at(graft):
    page = report.page(graft.plan, graft.model, environment={})
    assert section(page, "errors").text.endswith("Not looked at.")
    assert section(page, "speed").text.endswith("Not measured.")


def test_the_environment_is_that_of_this_process_unless_given(graft, page):
    rows = [[cell.text for cell in row.children] for row in section(page, "environment").all("tr")]
    assert rows == [["torch", "2.0"], ["devices", "a <card>, b"], ["triton", "none"]]
    assert importlib.metadata.version("torch") in section(report.page(graft.plan, graft.model), "environment").text


def test_the_file_needs_nothing_else(page):
    root = parsed(page)
    assert {each.name for each in root.all()}.isdisjoint({"script", "link", "img", "iframe", "object", "embed", "base"})
    for each in root.all():
        assert not {name for name in each.attributes if name.startswith("on") or name in ("src", "style", "srcset")}
        assert each.attributes.get("href", "#").startswith("#")
    style = next(root.all("style")).text
    assert not re.search(r"url\(|@import", style)


def test_links_lead_to_sections(page):
    root = parsed(page)
    links = [each.attributes["href"].removeprefix("#") for each in root.all("a")]
    assert links == [each.attributes["id"] for each in root.all("section")]


HOSTILE = "</style><script>alert(1)</script>\"'&<!--"


def test_everything_is_escaped(verification, benchmark):
    model = toys.model()
    model.add_module(HOSTILE.replace(".", ""), type(HOSTILE, (nn.Identity,), {})())
    graft = kernelgraft.graft(model, KERNELS, example_inputs=toys.inputs())
    plan = dataclasses.replace(
        graft.plan,
        model=HOSTILE,
        near_misses=(NearMiss("norm", HOSTILE, HOSTILE, HOSTILE),),
        rejected=(Rejected(HOSTILE, HOSTILE, HOSTILE),),
        kinds=tuple(
            dataclasses.replace(kind, checked=HOSTILE, classes=(HOSTILE,) * len(kind.classes))
            for kind in graft.plan.kinds
        ),
    )
    checks = tuple(
        dataclasses.replace(each, case=HOSTILE, input=HOSTILE, faults=(HOSTILE,), note=HOSTILE)
        for each in verification.checks
    )
    verified = dataclasses.replace(verification, model=HOSTILE, device=HOSTILE, checks=checks)
    timed = dataclasses.replace(
        benchmark,
        model=HOSTILE,
        notes=(HOSTILE,),
        versions={HOSTILE: HOSTILE},
        rows=tuple(dataclasses.replace(row, case=HOSTILE, input=HOSTILE) for row in benchmark.rows),
    )
    page = report.page(plan, model, verification=verified, benchmark=timed, environment={HOSTILE: [HOSTILE]})
    root = parsed(page)
    assert not list(root.all("script"))
    assert next(root.all("h1")).text == HOSTILE
    assert page.count("<style>") == page.count("</style>") == 1


def test_the_same_data_gives_the_same_file(tmp_path, graft, verification, benchmark, page):
    for name, each in (("verified.json", verification), ("timed.json", benchmark)):
        (tmp_path / name).write_text(json.dumps(each.to_json()))
    written = report.write(
        tmp_path / "new" / "report.html",
        kernelgraft.Plan.from_json(json.loads(json.dumps(graft.plan.to_json()))),
        report.tree_of(toys.model()),
        verification=report.read_verification(tmp_path / "verified.json"),
        benchmark=report.read_benchmark(tmp_path / "timed.json"),
        environment=ENVIRONMENT,
    )
    assert written.read_text(encoding="utf-8") == page


def test_reports_of_another_graft_are_refused(graft, verification, benchmark):
    other = grafted({"Norm": KERNELS["Norm"]})
    with pytest.raises(ReportError, match="The verification is of another graft"):
        report.page(other.plan, other.model, verification=verification)
    with pytest.raises(ReportError, match=r"at layers\.0\.norm it has NormMLP and the plan FastNorm"):
        report.page(other.plan, other.model, benchmark=benchmark)
    with pytest.raises(ReportError, match="it is of Elsewhere"):
        report.page(graft.plan, graft.model, benchmark=dataclasses.replace(benchmark, model="Elsewhere"))


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"kinds": 1, "checks": 2}', "null"])
@pytest.mark.parametrize("read", [report.read_verification, report.read_benchmark])
def test_a_file_that_is_no_report_is_refused(tmp_path, read, content):
    (tmp_path / "file.json").write_text(content)
    with pytest.raises(ReportError, match=r"file\.json is .*It must be what to_json\(\) of a report of graft\."):
        read(tmp_path / "file.json")


def test_a_file_that_cannot_be_read_or_written_is_named(tmp_path, graft):
    with pytest.raises(ReportError, match=r"missing\.json cannot be read: No such file"):
        report.read_verification(tmp_path / "missing.json")
    with pytest.raises(ReportError, match="cannot be written"):
        report.write(tmp_path, graft.plan, graft.model)


@pytest.mark.parametrize("top", [1.25, 1.5, 1.75, 3, 4, 7.9, 8.5, 12, 41, 250, 1e5])
def test_every_axis_has_a_few_ticks(top):
    assert 3 <= int(top / _step(top)) + 1 <= 7
