"""The table of an acceptance run on a GPU."""

import json
import sys

import pytest

from benchmarks import attention
from benchmarks.gpu import model, table, targets
from benchmarks.gpu.rows import Rows
from benchmarks.lib.shapes import GPU

from .tables import cells, network


def test_the_gpu_table_has_losses_and_images_and_names_what_else_lies_there(tmp_path, monkeypatch, capsys):
    path = tmp_path / "losses.json"
    monkeypatch.setattr(sys, "argv", ["attention", "--quick", "--dtype", "float32", "--json", str(path)])
    attention.main()
    rows = {row["case"]: row for row in json.loads(path.read_text())["rows"]}
    accuracies = [network("SAD", accuracy=0.5), network("LTH-SAD", 0.4, accuracy=0.25)]
    results = {"schema": 1, "command": "sparsekd run cifar100", "task": {"kind": "images"}, "rows": accuracies}
    (tmp_path / "cifar100.json").write_text(json.dumps(results))
    (tmp_path / "merged.json").write_text(json.dumps({"schema": 1, "runs": []}))
    (tmp_path / "cut.json").write_text("{")
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["table", str(tmp_path)])
    table.main()
    text = capsys.readouterr().out
    assert text == (tmp_path / "table.md").read_text() and "REHEARSAL" in text
    for name in ("kd 64x100", "quick sad nhwc float32"):
        found, row = cells(text, name), rows[name]
        assert found[:3] == [f"{row['ours_us']:.0f}", f"{row['speedup_eager']:.2f}", "-"]
    assert cells(text, "LTH-SAD @ 0.4") == ["25.00%", "-", "1"]
    assert "no results of these benchmarks: cut.json, merged.json" in text


def test_rows_of_a_stage_that_was_cut_off_are_in_the_table(tmp_path, capsys):
    row = {"batch": 256, "density": 0.3, "mask": "wide", "direction": "forward", "layer": "resnet50-3x3-256"}
    Rows(tmp_path / "rows" / "layers-256-bfloat16.jsonl").add("one", row | {"speedup": 2.5, "auto": 2.25})
    Rows(tmp_path / "rows" / "infer-resnet50-256.jsonl").add("one", {"model": "dense", "us": 7000.0, "speedup": 1.0})
    Rows(tmp_path / "rows" / "trips.jsonl").add("one", {"us": 1.0})
    table.main([str(tmp_path)])
    text = capsys.readouterr().out
    assert (
        "| 256 | 0.3 | wide | forward | 1 | 2.50 | 2.25 |" in text and "| infer-resnet50-256 | dense | 7000.0 |" in text
    )
    assert "cut off before their end: layers-256-bfloat16, infer-resnet50-256" in text


def test_packed_tables_stand_beside_dense_ones_in_the_table(tmp_path):
    row = {"op": "bag", "dim": 64, "dtype": "bfloat16", "us": 12.34, "speedup": 1.5, "gigabytes_per_second": 1234.5}
    Rows(tmp_path / "rows" / "embedding.jsonl").add("one", row)
    table.main([str(tmp_path)])
    text = (tmp_path / "table.md").read_text()
    assert (
        cells(text, "bag") == ["64", "bfloat16", "12.3", "1.50", "1234"] and "cut off before their end: embed" in text
    )


def test_targets_stand_beside_what_came_and_what_was_predicted():
    case = {"mask": "free", "direction": "forward", "density": 0.3, "batch": 256}
    wide = [case | {"layer": layer, "speedup": x} for layer, x in (("wrn-28-10-320", 2.0), ("resnet50-3x3-256", 8.0))]
    others = [wide[0] | {"speedup": 99.0} | other for other in ({"layer": "resnet50-3x3-64"}, {"batch": 32})]
    (line,) = table.target_lines([*wide, *others])[2:]
    kept = json.loads(table.PREDICTED.read_text())["targets"]
    (predicted,) = [row["predicted"] for row in kept if tuple(row.values())[:3] == ("forward", "free", 0.3)]
    assert line == f"| forward | free | 0.3 | 2 | 4.00 | 1.7 | {predicted:.2f} |"
    assert [row["speedup"] for row in kept] == [target.speedup for target in targets.TARGETS]


@pytest.mark.parametrize("direction", ["forward", "grad_input", "grad_values"])
def test_the_kept_predictions_are_those_of_the_model_as_it_is(direction):
    """After a change of the cost model: python -m benchmarks.gpu.model"""
    pytest.importorskip("triton")
    record = json.loads(table.PREDICTED.read_text())
    case = {"batch": 256, "density": 0.3, "mask": "wide", "direction": direction}
    name = "resnet50-3x3-256"
    (kept,) = [row for row in record["rows"] if row == row | case | {"layer": name}]
    assert kept == {"layer": name} | model.predict(GPU[name], 256, 0.3, "wide", direction)
    assert record["targets"] == model.against_targets(record["rows"])
