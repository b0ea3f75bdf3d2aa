"""The page of a scan shows every number of it, and names every layer."""

import pytest

from sparsekd import report
from sparsekd.pruning import Sensitivity

from .test_page import Outline


@pytest.fixture
def scan():
    layers = {"stem<1>": (0.91, 0.72), "head": (0.9, 0.905)}
    return Sensitivity(0.92, (0.5, 0.2), layers, {"stem<1>": (1.0, 2.0), "head": (4.0, 8.0)})


def test_a_scan_is_a_chart_and_a_table(scan, tmp_path):
    path = report.write_sensitivity(scan, tmp_path / "scan.html", "accuracy")
    page = Outline(path.read_text())
    text = " ".join(page.words)
    assert "Sensitivity of 2 layers" in text and "accuracy of the whole network: 0.92" in text
    for word in ("stem<1> at density 0.2: 0.72", "head at density 0.5: 0.9", "1  stem<1>", "2  head", "0.905"):
        assert word in text
    assert len(page.all("svg")) == 1 and len(page.all("polyline")) == 2 and len(page.all("circle")) == 4
    assert not page.all("script") and not page.all("link")


def test_the_worth_of_a_layer_stands_in_its_row(scan):
    worth = scan.worth()
    assert f"<td>{worth['head']:.3g}</td></tr>" in report.sensitivity_page(scan)
    assert worth["stem<1>"] > worth["head"] > 0
