"""The table of an acceptance run on a GPU."""

import json
import sys

from benchmarks import attention
from benchmarks.gpu import table

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
