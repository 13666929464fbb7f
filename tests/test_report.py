"""The HTML report: what it says, that it needs nothing else, and that a real browser shows it."""

import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from html import unescape
from pathlib import Path

import pytest

from launch import report
from launch.runs import read
from tests.test_compare import make_run

NAMES = ["nsa short", "full $hort_", "nsa <b>long</b>", "full long & more"]


@pytest.fixture
def runs(tmp_path):
    """Both attentions at two lengths, one of them on another device, with names that HTML and TeX would read."""
    contexts, rates = (1024, 1024, 4096, 4096), (3000.0, 2000.0, 2500.0, 500.0)
    kinds, devices = ("nsa", "full") * 2, ("cpu", "cpu", "cpu", "another")
    made = zip(NAMES, kinds, rates, devices, contexts)
    folder = [
        (make_run(tmp_path / str(i), kind, rate, device, context=context, health=kind == "nsa"), name)
        for i, (name, kind, rate, device, context) in enumerate(made)
    ]
    return [read(Path(path).rename(tmp_path / name.replace("/", "|"))) for path, name in folder]


@pytest.fixture
def page(runs) -> str:
    return report.page(runs)


def cells(page: str) -> list[str]:
    return [unescape(cell) for cell in re.findall(r"<td>(.*?)</td>", page)]


def test_it_says_what_was_measured_and_where(page, runs):
    text = unescape(page)
    assert f"{runs[0].name} against {runs[1].name} at 1024 tokens of context: 1.50x" in text
    assert f"{runs[2].name} against {runs[3].name} at 4096 tokens of context: 5.00x" in text
    assert "measured on 1 x cpu (baseline measured on 1 x another)" in text
    assert "device differs (cpu, another)" in text
    assert {"3,000", "500", "7.2500", "0.50 GiB", "1 x another"} <= set(cells(page))


def test_it_has_every_chart(page):
    titles = [
        "Loss against tokens",
        "Loss against time",
        "Throughput",
        "Speed-up",
        "Memory",
        "Loss by context",
        "Sparsity: gate cmp",
    ]
    charts = [ET.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]
    words = [{"".join(t.itertext()) for t in chart.iter("{http://www.w3.org/2000/svg}text")} for chart in charts]
    assert len(charts) == len(titles)
    for title, said in zip(titles, words):
        assert title in said
    assert {"1,024", "4,096"} <= words[2]
    assert NAMES[1] in words[4], "a dollar sign is no formula"


def test_no_label_is_a_formula(page):
    """Names are not read as TeX, so a tick that matplotlib writes in TeX would be shown as it is."""
    assert "mathdefault" not in page


def test_it_shows_only_what_differs_in_the_configurations(runs):
    rows = report.differences([r.config for r in runs])
    assert rows == {
        "attention.kind": ["nsa", "full", "nsa", "full"],
        "data.seq_len": [1024, 1024, 4096, 4096],
    }
    assert report.differences([{"a": {"b": 1}}, {"a": {}}]) == {"a.b": [1, "-"]}


def test_it_needs_nothing_else(page):
    assert not re.search(r"<(script|link|img|iframe|object|embed)\b|@import|url\((?!#)", page)
    assert all(link.startswith("#") for link in re.findall(r'(?:href|src)="([^"]*)"', page))
    assert "default-src 'none'" in page
    assert "<b>long" not in page


@pytest.mark.browser
def test_a_browser_shows_it(page, tmp_path):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs chromium (apt-get install chromium)")
    (tmp_path / "report.html").write_text(page)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    address = (tmp_path / "report.html").as_uri()

    def run(*more: str) -> str:
        command = [browser, *flags, *more, address]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout

    picture = tmp_path / "report.png"
    shown = run("--dump-dom")
    assert shown.count("</svg>") == 7
    assert shown.count("<tr>") == page.count("<tr>"), "the browser repaired the page"
    run("--window-size=1280,2400", f"--screenshot={picture}")
    from matplotlib import image

    pixels = image.imread(picture)[..., :3]
    assert pixels.shape[:2] == (2400, 1280)
    drawn = pixels.min(axis=2) < 0.95
    assert drawn[:600].any(), "the table"
    assert drawn[600:].any(axis=1).mean() > 0.3, "the charts"
