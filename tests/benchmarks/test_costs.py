"""The prediction of costs is compared with frozen networks: a row for every network, budget and scope."""

import json

import pytest
import torch
from torch import nn

from benchmarks import costs
from sparsekd.pruning import CostTable, LayerCost
from sparsekd.pruning.cost import network_of

from .test_scripts import run_script


def small():
    return nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 256, 3), nn.Flatten())


@pytest.fixture
def table(monkeypatch):
    """In place of measured costs: on a busy machine half of the dense time may be more than can be reached."""

    def measure(model, inputs, **options):
        layer = LayerCost("16x1", 100.0, (0.1, 0.5), (10.0, 50.0))
        shapes = tuple(tuple(x.shape) for x in inputs)
        network = network_of(model)
        return CostTable("any", "any", 1, len(inputs[0]), shapes, "float32", "float32", network, 5.0, {"3": layer})

    monkeypatch.setattr(costs.CostTable, "measure", measure)


def test_rows_say_what_was_predicted_and_measured(capsys, table):
    network = (small, lambda batch: (torch.randn(batch, 3, 24, 24),), ("0",))
    budgets = [costs.Budget.parse("x", text) for text in ("macs=0.3", "latency_us=0.5")]
    rows = costs.rows_of("small", network, 2, budgets, ["layer"], seconds=0.01, layer_ms=0.5)
    assert [row["budget"] for row in rows] == ["macs=0.3", "latency_us=0.5"]
    for row in rows:
        drift = row["measured_dense_us"] / row["dense_us"]  # of the machine, which is no error of the table
        assert row["drift"] == pytest.approx(drift - 1)
        assert row["error"] == pytest.approx(drift * row["predicted_us"] / row["measured_us"] - 1)
        assert 0 < row["predicted_us"] <= row["dense_us"] == 105 and row["batch"] == 2
    assert rows[0]["arrived"] is None
    assert rows[1]["arrived"] == pytest.approx(rows[1]["measured_us"] / (0.5 * rows[1]["measured_dense_us"]) - 1)
    assert "small n2" in capsys.readouterr().out


def test_what_cannot_be_reached_is_a_row(table):
    network = (small, lambda batch: (torch.randn(batch, 3, 24, 24),), ("0",))
    (row,) = costs.rows_of("small", network, 2, [costs.Budget.parse("x", "latency_us=0.01")], ["layer"], 0.01, 0.5)
    assert "cannot be reached" in row["refused"] and "measured_us" not in row


def test_the_networks_are_those_that_the_script_names():
    for name in ("resnet18", "wrn-16-2", "rating-cnn"):
        build, inputs_of, exclude = costs.NETWORKS[name]
        model = costs.settle(build(), *inputs_of(2))
        with torch.no_grad():
            assert model(*inputs_of(1)).shape[0] == 1
        assert exclude


def test_the_script_writes_its_rows(monkeypatch, tmp_path):
    arguments = ["--network", "rating-cnn", "--budget", "macs=0.3", "--scope", "cost", "--layer-ms", "0.2"]
    arguments += ["--seconds", "0.01", "--threads", "1", "--out", str(tmp_path / "costs.json")]
    assert run_script(monkeypatch, "benchmarks.costs", *arguments) == 0
    (row,) = json.loads((tmp_path / "costs.json").read_text())["rows"]
    assert row["network"] == "rating-cnn" and row["table_seconds"] > 0 and row["scope"] == "cost"
