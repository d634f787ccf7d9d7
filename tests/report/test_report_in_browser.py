"""The report in a real browser: it lays out on wide and narrow screens, in light and dark, and breaks no rule."""

import browser
import pytest
from test_report_page import ENVIRONMENT, grafted

import toys
from kernelgraft import report

pytestmark = pytest.mark.skipif(
    browser.chromium() is None,
    reason=f"there is no Chromium here: install one ({', '.join(browser.NAMES)}) or name it in KERNELGRAFT_CHROMIUM",
)


@pytest.fixture(scope="module")
def page():
    graft = grafted()
    verification = graft.verify(toys.inputs())
    benchmark = graft.benchmark(toys.inputs(), tokens=(1,), repeats=2, verified=verification)
    return report.page(graft.plan, graft.model, verification=verification, benchmark=benchmark, environment=ENVIRONMENT)


@pytest.mark.parametrize("width", [1200, 390])
def test_nothing_is_wider_than_the_screen(tmp_path, page, width):
    found = browser.measured(tmp_path, page, width)
    assert found["width"] <= width
    assert found["content"] <= found["width"]
    assert found["wide"] == []


def test_charts_grow_with_the_screen(tmp_path, page):
    narrow, wide = (browser.measured(tmp_path, page, width) for width in (390, 1000))
    assert len(narrow["bars"]) == len(wide["bars"]) > 0
    assert all(2 * a < b for a, b in zip(narrow["bars"], wide["bars"], strict=True) if a > 20)
    assert all(0 < x < narrow["width"] for x in narrow["dots"])


def test_dark_and_light_follow_the_system(tmp_path, page):
    light, dark = (browser.measured(tmp_path, page, dark=is_dark) for is_dark in (False, True))
    assert brightness(light["background"]) > 0.9 > 0.3 > brightness(light["colour"])
    assert brightness(dark["background"]) < 0.2 < 0.8 < brightness(dark["colour"])


def brightness(colour):
    return sum(map(int, colour.removeprefix("rgb(").rstrip(")").split(", "))) / (3 * 255)


def test_it_opens_from_disk_without_a_complaint(tmp_path, page):
    (tmp_path / "report.html").write_text(page, encoding="utf-8")
    done = browser.run(tmp_path, (tmp_path / "report.html").as_uri(), "--dump-dom")
    assert "Equality with the original" in done.stdout
    complaints = [line for line in done.stderr.splitlines() if ":CONSOLE" in line or "Content Security Policy" in line]
    assert complaints == []


def test_a_screenshot_shows_something(tmp_path, page):
    (tmp_path / "report.html").write_text(page, encoding="utf-8")
    shot = tmp_path / "shot.png"
    browser.run(tmp_path, (tmp_path / "report.html").as_uri(), "--window-size=1000,1600", f"--screenshot={shot}")
    assert shot.read_bytes().startswith(b"\x89PNG")
    assert shot.stat().st_size > 50_000
