"""The same seeds give the same numbers as before, to the bit: stored results of earlier runs are run again.

    SPARSEKD_STORED_RESULTS=FOLDER pytest -m slow tests/test_same_numbers.py

FOLDER has results.json files of runs with the code of before, made on this machine with as many threads. Every run is
made again as its `command` says (but for --out), and compared in all numbers that do not depend on time.
"""

import dataclasses
import json
import os
import shlex
from pathlib import Path

import pytest

from sparsekd import cli, runs

VARIABLE = "SPARSEKD_STORED_RESULTS"
# What a clock or a counter measured, or what follows from it: which layers freeze runs sparse.
TIMED = ("latency_", "throughput_", "joules", "seconds", "step_ms", "train_", "frozen_difference")


def differences(stored, now, path="results"):
    """(path, stored, now) of every number, word and list that differs; what is only in `now` does not count."""
    if isinstance(stored, dict) and isinstance(now, dict):
        untimed = (key for key in stored if not key.startswith(TIMED))
        return [d for key in untimed for d in differences(stored[key], now.get(key, "missing"), f"{path}.{key}")]
    if isinstance(stored, list) and isinstance(now, list) and len(stored) == len(now):
        pairs = enumerate(zip(stored, now, strict=True))
        return [d for place, (a, b) in pairs for d in differences(a, b, f"{path}[{place}]")]
    return [] if stored == now else [(path, stored, now)]


def comparable(results):
    """The numbers of a results.json by what they belong to."""
    keys = ("target_density", "best_epoch", "metrics", "epochs", "blocks")
    rows = {
        f"{row['name']} seed {row['seed']} @ {row['target_density']}": {key: row[key] for key in keys}
        for row in results["rows"]
    }
    return {"rows": rows, "baselines": {score["name"]: score for score in results["baselines"]}}


def again(results, out):
    """The results of the same call, made now."""
    _, *arguments = shlex.split(results["command"])
    name = results["task"]["name"]
    (config,) = [
        one for one in cli.configs(arguments) if name in (one.task, "-".join([one.task, *one.options.values()]))
    ]
    return runs.run(dataclasses.replace(config, out=str(out), measure=False))[0]


def stored_results():
    folder = os.environ.get(VARIABLE)
    return sorted(Path(folder).rglob("results.json")) if folder else []


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get(VARIABLE), reason=f"{VARIABLE} names no folder of earlier results")
def test_there_are_stored_results():
    assert stored_results(), f"{os.environ[VARIABLE]} holds no results.json"


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get(VARIABLE), reason=f"{VARIABLE} names no folder of earlier results")
@pytest.mark.parametrize("path", stored_results(), ids=lambda path: "-".join(path.parts[-3:-1]))
def test_the_same_numbers_come_out(path, tmp_path):
    stored = json.loads(path.read_text())
    now = json.loads(json.dumps(again(stored, tmp_path)))
    found = differences(comparable(stored), comparable(now))
    lines = [f"{where}: stored {before!r}, now {after!r}" for where, before, after in found]
    assert not found, f"{path}: {len(lines)} numbers differ\n" + "\n".join(lines[:40])


def test_a_difference_is_named_with_both_values():
    epochs = [{"loss": 1.0, "seconds": 3.0}, {"loss": 0.5, "seconds": 3.0}]
    metrics = {"mse": 2.5, "latency_ms_dense": 1.0, "train_seconds": 9.0}
    row = {"name": "SAD", "seed": 0, "target_density": None, "best_epoch": 2, "metrics": metrics, "blocks": {}}
    stored = {"rows": [{**row, "epochs": epochs}], "baselines": [{"name": "ridge", "mse": 3.0, "setting": "alpha 1"}]}
    assert differences(comparable(stored), comparable(stored)) == []
    other = json.loads(json.dumps(stored))
    other["rows"][0]["metrics"] |= {"latency_ms_dense": 2.0, "train_seconds": 1.0, "new": 1.0}
    assert differences(comparable(stored), comparable(other)) == []
    other["rows"][0]["epochs"][1]["loss"] = 0.5 + 2**-53
    other["baselines"][0]["setting"] = "alpha 10"
    del other["rows"][0]["metrics"]["mse"]
    assert differences(comparable(stored), comparable(other)) == [
        ("results.rows.SAD seed 0 @ None.metrics.mse", 2.5, "missing"),
        ("results.rows.SAD seed 0 @ None.epochs[1].loss", 0.5, 0.5 + 2**-53),
        ("results.baselines.ridge.setting", "alpha 1", "alpha 10"),
    ]
