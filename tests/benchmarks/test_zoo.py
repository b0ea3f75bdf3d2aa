"""The zoo: one network through every stage, rows that are kept, and a page that says what they say."""

import argparse
import functools
import json
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import zoo
from benchmarks.lib import architectures, zoo_page


@pytest.fixture
def small(monkeypatch):
    def make():
        layers = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(576, 4)
        return nn.Sequential(*layers), (torch.randn(1, 3, 8, 8),)

    monkeypatch.setitem(architectures.NETWORKS, "small", make)


def measure(kind):
    return zoo.measure("small", kind, seconds=0.01, layer_ms=1.0, threads=1)


def test_a_network_goes_through_every_stage(small):
    row = measure("check")
    assert row["failed"] is None
    assert row["stages"] == ["built", "converted", *["frozen", "read back"] * 2]
    assert (row["converted"], row["norms"], row["folded@1"], row["folded@0.3"]) == (2, 1, 1, 1)
    assert row["traced@0.3"] == "torch.fx" and row["parity@0.3"] <= zoo.LIMIT


def test_a_network_is_timed_at_each_density(small):
    row = measure("time")
    assert row["failed"] is None and row["stages"] == ["timed", "timed"]
    assert row["machine"]["threads"] == 1
    assert row["openvino_us"] is None or row["openvino_us"] > 0
    low, high = row["frozen/eager_quartiles@0.3"]
    assert 0 < low <= row["frozen/eager@0.3"] <= high
    assert 0 <= row["elsewhere@0.3"] <= 1


def test_a_stage_that_is_wrong_is_named(small, monkeypatch):
    monkeypatch.setattr(zoo, "LIMIT", -1.0)
    row = measure("check")
    assert row["stages"] == ["built"] and row["failed"].startswith("RuntimeError: the block-sparse network differs by")


def test_rows_that_are_there_are_not_made_again(tmp_path):
    out = tmp_path / "rows/zoo.jsonl"
    options = argparse.Namespace(out=out, again=False, threads=1, seconds=1.0, layer_ms=1.0, minutes=1, stop_after=1.0)
    made = []

    def make(name, kind, options):
        made.append(name)
        return {"network": name, "kind": kind, "failed": None}

    zoo.make_rows(["a"], "time", options, make)
    zoo.make_rows(["a", "b"], "time", options, make)
    assert made == ["a", "b"]
    assert set(zoo.rows_in(out)) == {("a", "time"), ("b", "time")}
    with out.open("a") as file:  # other processes had half of the machine
        file.write(json.dumps({"network": "a", "kind": "time", "failed": None, "elsewhere@1": 0.5}) + "\n")
    assert ("a", "time") in zoo.rows_in(out) and "| a |" not in zoo_page.table(zoo.rows_in(out))
    zoo.make_rows(["a", "b"], "time", options, make)
    assert made == ["a", "b", "a"]
    options.stop_after = -1.0
    zoo.make_rows(["c"], "time", options, make)
    assert len(zoo.rows_in(out)) == 2


def test_the_table_says_what_failed_and_what_runs_its_own_forward():
    good = {"network": "a", "kind": "check", "failed": None, "converted": 3, "norms": 2}
    good |= {"folded@0.3": 2, "traced@0.3": "torch.fx"}
    timed = {"network": "a", "kind": "time", "failed": None, "openvino_us": 50.0, "eager_kept@1": True}
    timed |= {"frozen/eager@1": 1.0, "frozen/eager@0.3": 0.25, "frozen_us@0.3": 100.0}
    bad = {"network": "b", "kind": "check", "failed": "TypeError: no", "converted": 1}
    shown = zoo_page.table({(row["network"], row["kind"]): row for row in (good, timed, bad)})
    assert "| a | 3 | torch.fx | 2 of 2 | 1.00 (own forward) | 0.25 | 2.00 |" in shown
    assert "| b | 1 | TypeError: no | | | | |" in shown
    assert "1 of 2 networks pass every stage" in shown and "2 of 2 batch norms" in shown
    assert "at density .3: median 0.25 of 1" in shown


def test_only_what_is_between_the_marks_of_a_page_is_written(tmp_path):
    page = tmp_path / "zoo.md"
    page.write_text(f"# Zoo\n{zoo_page.BEGIN}old\n{zoo_page.END}More.\n")
    zoo_page.write(page, "new\n")
    assert page.read_text() == f"# Zoo\n{zoo_page.BEGIN}new\n{zoo_page.END}More.\n"
    assert zoo_page.between_marks(page.read_text()) == "new\n"


def test_there_are_enough_public_networks():
    assert sum(not name.startswith(("sparsekd/", "torch/")) for name in architectures.NETWORKS) >= 60


def test_the_page_says_what_the_rows_say():
    root = Path(zoo.__file__).parents[1]
    rows = zoo.rows_in(root / "benchmarks/results/zoo.jsonl")
    assert zoo_page.between_marks((root / "docs/zoo.md").read_text()) == zoo_page.table(rows)
    assert {name for name, _ in rows} <= set(architectures.NETWORKS)


def test_times_are_of_a_process_that_is_started_anew(monkeypatch):
    options = argparse.Namespace(seconds=1.0, layer_ms=2.0, threads=1, minutes=0.01)
    row, given = {"network": "small", "kind": "time", "failed": None}, []

    def answer(command, *, returncode=0, **_):
        given.append(command[3:])
        return subprocess.CompletedProcess(command, returncode, f"a package says hello\n{json.dumps(row)}\n")

    def late(command, timeout, **_):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(zoo.subprocess, "run", answer)
    assert zoo.in_a_process("small", "time", options) == row
    expected = "--one time --network small --seconds 1.0 --layer-ms 2.0 --threads 1"
    assert given == [expected.split()]
    monkeypatch.setattr(zoo.subprocess, "run", functools.partial(answer, returncode=-11))
    assert zoo.in_a_process("small", "time", options)["failed"] == "its process ended with status -11"
    monkeypatch.setattr(zoo.subprocess, "run", late)
    assert zoo.in_a_process("small", "time", options)["failed"] == "took more than 0.01 minutes"
