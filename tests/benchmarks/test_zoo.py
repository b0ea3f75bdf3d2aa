"""The zoo: one network through every stage, rows that are kept, and what failed in the table."""

import json

from torch import nn

from benchmarks import zoo


def test_a_network_goes_through_every_stage(monkeypatch):
    import torch

    def build():
        layers = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(576, 4)
        return nn.Sequential(*layers), (torch.randn(1, 3, 8, 8),)

    monkeypatch.setitem(zoo.NETWORKS, "small", build)
    row = zoo.measure("small", seconds=0.01, layer_ms=1.0, threads=1)
    assert row["failed"] is None
    assert row["stages"] == ["built", "converted", *["frozen", "timed", "read back"] * 2]
    assert (row["converted"], row["norms"], row["folded@0.3"] + row["eager_kept@0.3"]) == (2, 1, 1)
    assert row["parity@0.3"] <= zoo.LIMIT
    assert row["machine"]["threads"] == 1


def test_rows_are_kept_and_what_failed_is_said(tmp_path):
    path = tmp_path / "zoo.jsonl"
    assert zoo.rows_in(path) == {}
    good = {
        **{"network": "a", "failed": None, "converted": 3, "norms": 2, "openvino_us": 50.0},
        **{f"{key}@{density}": value for density in ("1", "0.3") for key, value in {
            "folded": 2, "traced": "torch.fx", "eager_kept": False, "frozen/eager": 0.25, "frozen_us": 100.0}.items()},
    }  # fmt: skip
    rows = [{"network": "a", "failed": "earlier"}, good, {"network": "b", "failed": "TypeError: no"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = zoo.table(zoo.rows_in(path))
    assert "| a | 3 | torch.fx | 2 of 2 | 0.25 | 0.25 | 2.00 | yes |" in shown
    assert "| b | - | TypeError: no |" in shown
    assert "1 of 2 pass every stage; 2 of 2 norms folded; median frozen / eager at density .3: 0.25" in shown


def test_there_are_enough_public_networks():
    assert sum(not name.startswith(("sparsekd/", "torch/")) for name in zoo.NETWORKS) >= 60
