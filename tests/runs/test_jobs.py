"""Networks that are trained at once: what they learn, what is left of the processes, and what ends them."""

import os
import subprocess
import sys
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest

from sparsekd import runs
from sparsekd.runs import jobs
from sparsekd.runs.run import CACHE

from . import made_up_images as here

# The processes import this file again, under another name, and so have the same tiny networks.
AT_ONCE = """
import shutil
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
import pytest
from sparsekd import runs
from tests.runs import made_up_images as here
here.shrink(pytest.MonkeyPatch())
if __name__ == "__main__":
    data, out = sys.argv[1:3]
    options = {"methods": ("sp-sad",), "densities": (0.3,), "options": {"views": 2}}
    said = []
    at_once, folder = runs.run(here.config(data, out + "2", threads=2, jobs=2, **options), said.append)
    shutil.copytree(folder / "seed0/teacher", Path(out + "1") / "seed0/teacher")  # which had both threads
    alone, _ = runs.run(here.config(data, out + "1", threads=1, **options), lambda line: None)
    assert not any("ended" in line for line in said), said
    assert len(at_once["rows"]) == len(alone["rows"]) == 4
    for mine, theirs in zip(at_once["rows"], alone["rows"], strict=True):
        assert mine["name"] == theirs["name"] and mine["blocks"] == theirs["blocks"]
        for name in ("accuracy", "cross_entropy", "val_accuracy", "macs"):
            assert mine["metrics"][name] == theirs["metrics"][name], (mine["name"], name)
        assert mine["metrics"]["train_joules"] is None or mine["name"] == "teacher"
    assert "side_by_side" not in alone["protocol"]
    assert at_once["protocol"]["side_by_side"].startswith("sad, sp-sad, student trained beside others")
    assert not list(folder.glob("seed0/*.cache"))
"""


def test_networks_trained_at_once_learn_the_same(folder, tmp_path):
    (tmp_path / "at_once.py").write_text(AT_ONCE)
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, str(tmp_path / "at_once.py"), str(folder), str(tmp_path / "out"), str(root)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
    )
    assert done.returncode == 0, done.stderr[-2000:]


class Ended:
    """A pool whose processes end with `error` before they have trained anything."""

    error: Exception

    def __init__(self, *args):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *args):
        pass

    def shutdown(self, cancel_futures):
        assert cancel_futures

    def submit(self, train, folder):
        future = Future()
        future.set_exception(self.error)
        return future


def test_a_run_goes_on_where_a_process_has_ended(folder, tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(jobs, "ProcessPoolExecutor", Ended)
    monkeypatch.setattr(Ended, "error", BrokenProcessPool("killed"), raising=False)
    left = tmp_path / "seed0" / CACHE  # of a call that was stopped
    left.parent.mkdir()
    left.write_bytes(b"")
    said = []
    results, _ = runs.run(here.config(folder, tmp_path, jobs=2, methods=("sp-sad",)), said.append)
    assert {row["name"] for row in results["rows"]} == {"teacher", "student", "SAD", "SP-SAD"}
    ended = [line.split()[4] for line in said if "ended (BrokenProcessPool); its training goes on here" in line]
    assert ended == ["student", "sad", "sp-sad"]
    assert not left.exists()


def test_what_goes_wrong_in_a_process_is_said_at_once(folder, tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(jobs, "ProcessPoolExecutor", Ended)
    monkeypatch.setattr(Ended, "error", RuntimeError("sparsekd.runs: SAD diverged in epoch 1"), raising=False)
    with pytest.raises(RuntimeError, match="SAD diverged in epoch 1"):
        runs.run(here.config(folder, tmp_path, jobs=2), lambda line: None)


def test_rows_under_other_settings_are_refused_before_anything_is_trained(folder, tmp_path, tiny, monkeypatch):
    runs.run(here.config(folder, tmp_path, methods=()), lambda line: None)
    (tmp_path / "seed0/teacher/rows.json").unlink()
    monkeypatch.setattr(jobs, "ProcessPoolExecutor", None)
    with pytest.raises(ValueError, match="is of another run: its pattern is 16x1, now 32x1"):
        runs.run(here.config(folder, tmp_path, methods=(), jobs=2, pattern="32x1"), lambda line: None)


def test_processes_stop_in_time(folder, tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(jobs, "ProcessPoolExecutor", Ended)
    monkeypatch.setattr(Ended, "error", runs.OutOfTime("student seed 0: 1 of 6 epochs"), raising=False)
    with pytest.raises(runs.OutOfTime, match="1 of 6 epochs"):
        runs.run(here.config(folder, tmp_path, jobs=2), lambda line: None)


def test_jobs_are_checked(folder, tmp_path, tiny, monkeypatch):
    with pytest.raises(ValueError, match="jobs must be at least 1, got 0"):
        here.config(folder, tmp_path, jobs=0)
    monkeypatch.setattr("sparsekd.distributed.num_ranks", lambda: 2)
    with pytest.raises(ValueError, match="got jobs 2 on cpu and 2 ranks; leave --jobs out"):
        runs.run(here.config(folder, tmp_path, jobs=2))
    assert not list(tmp_path.iterdir())


# The child holds the output of its parent open for as long as it lives.
KILLED = """
import multiprocessing, time
from sparsekd.runs import jobs

def work():
    jobs._end_with_parent()
    print("at work", flush=True)
    time.sleep(120)

if __name__ == "__main__":
    child = multiprocessing.get_context("spawn").Process(target=work)
    child.start()
    child.join()
"""


def test_processes_end_with_a_run_that_is_killed(tmp_path):
    (tmp_path / "killed.py").write_text(KILLED)
    run = subprocess.Popen([sys.executable, str(tmp_path / "killed.py")], stdout=subprocess.PIPE, text=True)
    assert run.stdout.readline() == "at work\n"
    run.kill()
    assert run.communicate(timeout=60)[0] == ""  # which waits until nobody can write to it any more
