"""Exported networks beside other run times: whatever is installed has a row, and answers as the frozen network does."""

import json

import pytest

from .test_scripts import run_script


def test_every_run_time_has_a_row(monkeypatch, tmp_path, capsys):
    pytest.importorskip("onnx")
    out = tmp_path / "deploy.json"
    arguments = ["--network", "rating-cnn", "--rounds", "1", "--seconds", "0.05", "--threads", "1", "--out", str(out)]
    assert run_script(monkeypatch, "benchmarks.deploy", *arguments) == 0
    rows = {row["runtime"]: row for row in json.loads(out.read_text())["rows"]}
    assert list(rows)[:3] == ["sparsekd.runtime", "FrozenModel", "ONNX Runtime"]
    for name in ("sparsekd.runtime", "FrozenModel"):
        row = rows[name]
        assert "absent" not in row and row["differs"] < 1e-5 and row["us"] > 0 and row["file_mb"] > 0.05
    assert rows["sparsekd.runtime"]["resident_mb"] < rows["FrozenModel"]["resident_mb"]
    assert "| rating-cnn | sparsekd.runtime |" in capsys.readouterr().out
