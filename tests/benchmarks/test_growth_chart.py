"""The chart of growing tables: what the docs show is drawn from the kept figures, without measuring."""

from pathlib import Path

import pytest

from benchmarks import embedding
from benchmarks.lib.growth_chart import picture

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "benchmarks/results/embedding_growth.json"


def test_the_chart_of_the_docs_is_that_of_the_kept_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(embedding, "growth", lambda args: pytest.fail("drawing measures nothing"))
    embedding.main(["--chart", str(KEPT), "--svg", str(tmp_path / "growth.svg")])
    drawn = (tmp_path / "growth.svg").read_text()
    assert drawn == (ROOT / "docs/embedding_growth.svg").read_text()
    assert drawn.count("<polyline") == 3 and "10,000,000 rows, packed: 881 MB" in drawn


def test_a_chart_without_growth_says_what_is_missing(capsys):
    with pytest.raises(ValueError, match="rows of the part growth, got none; add --part growth"):
        picture([{"part": "lines"}], {})
    with pytest.raises(SystemExit):
        embedding.main(["--chart", str(KEPT)])
    assert "--chart needs --svg" in capsys.readouterr().err
