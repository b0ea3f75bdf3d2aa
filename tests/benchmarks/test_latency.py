"""Percentiles under load: every run time has a row for every number of busy processes, and the neighbours are gone."""

import json
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import latency
from benchmarks.networks import Contestant

FIELD = [Contestant("resnet18-n1", runtime, "fp32", 0.3) for runtime in ("ours", "openvino")]


class Team:
    """A stand-in for the workers: ours takes 1 ms, the peer 4 ms, and one call in ten ten times as long."""

    def __init__(self, off: float = 0.0) -> None:
        self.off, self.blocks = off, 0

    def ask(self, process, what, one, count=None):
        mine = one.runtime == "ours"
        if what == "build":
            return np.ones(4) + (0 if mine else self.off)
        self.blocks += 1
        return [1e-3 * (1 if mine else 4) * (10 if i == 0 else 1) for i in range(count)]


def test_percentiles_and_their_ratios():
    team = Team()
    ours, peer = latency.percentiles(team, FIELD, 0, blocks=5)
    assert team.blocks == 10 and ours["calls"] == 5 * latency.CALLS
    assert (ours["p50_ms"], ours["p99_ms"], peer["p50_ms"], peer["p95_ms"]) == (1.0, 10.0, 4.0, 40.0)
    assert ours["p95_of_peer"] == 0.25 and peer["p95_of_peer"] == 1.0
    assert "| 0 | ours fp32 0.3 | 1.0 | 0.25 | 10.0 | 0.25 |" in latency.table([ours, peer])


def test_what_disagrees_is_not_timed():
    with pytest.raises(RuntimeError, match=r"openvino fp32 and ours fp32 0\.3 differ by 0\.5 of the largest"):
        latency.build(Team(off=0.5), FIELD)


def test_neighbours_end_with_the_block(monkeypatch):
    started, popen = [], subprocess.Popen

    def start(command):
        started.append(popen(command))
        return started[-1]

    monkeypatch.setattr(latency.subprocess, "Popen", start)
    with pytest.raises(KeyError), latency.neighbours(2):
        assert [one.poll() for one in started] == [None, None]
        raise KeyError
    assert all(one.poll() is not None for one in started)


def test_the_whole_command(tmp_path, monkeypatch, capsys):
    pytest.importorskip("openvino")
    out = tmp_path / "latency.json"
    monkeypatch.setattr(sys, "argv", f"latency --network resnet18-n1 --busy 0 1 --blocks 1 --out {out}".split())
    latency.main()
    rows = json.loads(out.read_text())["rows"]
    assert [(row["busy"], row["name"].split()[0]) for row in rows] == [
        (b, n) for b in (0, 1) for n in ("ours", "openvino")
    ]
    assert all(row["p99_ms"] >= row["p95_ms"] >= row["p50_ms"] > 0 for row in rows)
    assert "p95, ms" in capsys.readouterr().out
