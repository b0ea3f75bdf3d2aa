"""Pages as a browser lays them out: nothing leaves them, no words lie on others, whatever the width and the ground."""

import json
from pathlib import Path

import pytest

from sparsekd import report
from sparsekd.pruning import Sensitivity
from sparsekd.report import page

from . import browser

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
WIDTHS = (1280, 520, 360)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Kept results: one seed of one run, several runs, a stream with every window, a scan of many layers."""
    folder = tmp_path_factory.mktemp("pages")
    several = [RESULTS / name for name in ("movietweetings.json", "cifar100-reduced.json", "movies-social.json")]
    stream = json.loads((RESULTS / "stream-abrupt-90.json").read_text())
    layers = {f"blocks.{number}.conv1": (0.9 - number / 100, 0.8) for number in range(20)}
    scan = Sensitivity(0.92, (0.5, 0.2), layers, {name: (1.0, 2.0) for name in layers})
    return {
        "one": report.write(report.read(RESULTS / "movietweetings-quick.json"), folder / "one")[2].read_text(),
        "several": report.merge(several, folder / "several")[2].read_text(),
        "stream": report.write(stream, folder / "stream")[2].read_text(),
        "scan": report.sensitivity_page(scan, "accuracy"),
    }


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_pages_fit_and_can_be_read(pages, tmp_path, dark):
    found = browser.look(list(pages.values()), WIDTHS, tmp_path, dark)
    assert len(found) == len(pages) * len(WIDTHS)
    for (name, width), seen in zip(((name, width) for name in pages for width in WIDTHS), found, strict=True):
        where = f"{name} at {width} px"
        assert width - 20 <= seen["width"] <= width and seen["charts"] > 0, where
        assert not seen["faults"], f"{where}: {seen['faults']}"
        assert (seen["ground"] < 0.1) == dark, where
        assert seen["text"] > 7 and seen["faintest"] > 3, where  # contrasts that WCAG asks of text and of shapes
        assert seen["smallest"] > 8, f"{where}: text of {seen['smallest']} px"


def test_the_browser_finds_what_is_wrong(pages, tmp_path):
    """The measurement itself: a page that is too wide, and a chart whose words leave it and meet."""
    wide = pages["one"].replace("</body>", '<div style="width:900px">wide</div></body>')
    words = (
        '<text x="-40" y="40">left of the chart</text><text x="100" y="60">one</text><text x="104" y="62">two</text>'
    )
    crowded = pages["one"].replace("</svg>", f"{words}</svg>", 1)
    first, second = browser.look([wide, crowded], [360], tmp_path)
    assert any("scrolls sideways" in fault for fault in first["faults"]) and len(first["faults"]) == 2
    assert [fault.split('"')[1] for fault in second["faults"]][-2:] == ["left of the chart", "two"]


def test_it_is_said_where_there_is_no_browser(monkeypatch):
    monkeypatch.setattr(browser.shutil, "which", lambda name: None)
    with pytest.raises(pytest.skip.Exception, match="no Chromium here to lay the page out"):
        browser.chromium()


def test_pages_of_results_without_rows():
    empty = {"command": "x", "task": {"name": "none"}, "protocol": {}, "baselines": [], "rows": []}
    run = report.with_goal(empty)
    assert "none: distilled, pruned, frozen" in page.html([{**run, "summary": []}])
