"""A folder belongs to one run at a time, is swept, and is written to before anything is trained."""

import json
import multiprocessing
import os
import platform
import time
from types import SimpleNamespace

import pytest
from torch import nn

from sparsekd import checkpoint, cli
from sparsekd.runs import record, run
from sparsekd.runs.config import RunConfig
from sparsekd.runs.folder import LOCK, OWNER, claimed


def _holds(out, told):
    with claimed(out):
        told.set()
        time.sleep(3600)


@pytest.fixture
def holder(tmp_path):
    """Another process that works in tmp_path."""
    context = multiprocessing.get_context("fork")  # which does not import torch anew; the child computes nothing
    told = context.Event()
    process = context.Process(target=_holds, args=(tmp_path, told))
    process.start()
    assert told.wait(300)
    yield process
    process.kill()
    process.join()


def test_a_second_run_is_told_who_is_there(tmp_path, holder, capsys):
    before = (tmp_path / OWNER).read_text()
    assert json.loads(before)["pid"] == holder.pid
    assert cli.main(["run", "--quick", "--fresh", "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path} is in use by process {holder.pid} on {platform.node()}, since 20" in said
    assert "wait for it, stop it, or give another --out" in said
    assert (tmp_path / OWNER).read_text() == before
    with pytest.raises(RuntimeError, match="in use"):
        run(RunConfig("movietweetings", quick=True, out=str(tmp_path)))
    (tmp_path / OWNER).unlink()  # as it is for a moment after the lock was taken
    with pytest.raises(RuntimeError, match="another process, which has not yet said which"), claimed(tmp_path):
        pass


def test_a_killed_run_does_not_hold_the_folder(tmp_path, holder):
    holder.kill()
    holder.join()
    assert (tmp_path / LOCK).exists() and (tmp_path / OWNER).exists()
    with claimed(tmp_path):
        assert json.loads((tmp_path / OWNER).read_text())["pid"] == os.getpid()
    assert not list(tmp_path.iterdir())


def test_what_killed_runs_left_half_written_is_swept_and_nothing_else(tmp_path):
    inner = tmp_path / "seed0" / "teacher"
    inner.mkdir(parents=True)
    left = [folder / ".sparsekd.abc.part" for folder in (tmp_path, inner.parent, inner)]
    others = [
        folder / name for folder in (tmp_path, inner) for name in ("mine.part", ".sparsekd.txt", "model.safetensors")
    ]
    for path in (*left, *others):
        path.write_text("x")
    with claimed(tmp_path):
        assert not any(path.exists() for path in left) and all(path.exists() for path in others)


def test_a_full_disk_is_named_before_anything_is_trained(tmp_path, capsys, monkeypatch):
    from sparsekd.runs.run import _Run

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(_Run, "train", lambda *args: pytest.fail("trained on a full disk"))
    assert cli.main(["run", "--quick", "--out", str(tmp_path / "out")]) == 2
    assert f"No space left on device: '{tmp_path / 'out'}" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


def test_the_file_that_a_full_disk_stopped_is_named(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    path.write_text("old")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"results\.json") as caught:
        checkpoint.write_atomically(path, b"new")
    assert caught.value.errno == 28 and path.read_text() == "old" and [*tmp_path.iterdir()] == [path]


def test_the_advice_on_a_damaged_file_is_that_of_its_reader(tmp_path):
    path = tmp_path / "network.skd"
    path.write_bytes(b"no such file")
    with pytest.raises(ValueError, match="write it again") as plain:
        checkpoint.load_state(path)
    assert "train" not in str(plain.value) and "--fresh" not in str(plain.value)
    with pytest.raises(ValueError, match="bake another"):
        checkpoint.load_state(path, "bake another")


def test_a_damaged_network_of_a_run_is_trained_again_by_deleting_it(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"no such file")
    network = SimpleNamespace(make=lambda: nn.Linear(2, 2), file=lambda density: "model.safetensors")
    finished = record.Finished(network, 0, tmp_path, {}, [])
    with pytest.raises(
        ValueError, match=r"model\.safetensors is .*corrupt.*delete .* to train it again, or pass --fresh"
    ):
        finished.load(None)
