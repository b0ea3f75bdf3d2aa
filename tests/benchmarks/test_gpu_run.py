"""The driver of the quarter of an hour on a GPU: resumed, cut off, archived; rows on the disk at once."""

import json
import sys
import tarfile
import zipfile
from unittest import mock

import pytest

from benchmarks.gpu import network, run
from benchmarks.gpu.rows import Rows


def step(name, code, seconds=20, **more):
    return run.Step(name, seconds, [sys.executable, "-c", code], **more)


def state(out):
    return {name: one["status"] for name, one in json.loads((out / "state.json").read_text()).items()}


def test_finished_steps_are_skipped_and_failed_ones_tried_again(tmp_path):
    out = tmp_path / "gpu"
    counted = f"open({str(tmp_path / 'count')!r}, 'a').write('x')"
    fails = f"{counted}; raise SystemExit(3)"
    assert not run.execute([step("good", counted), step("bad", fails)], out, rehearse=False, seconds=60)
    assert state(out) == {"good": "done", "bad": "failed (3)"}
    assert run.execute([step("good", fails), step("bad", counted)], out, rehearse=False, seconds=60)
    assert state(out) == {"good": "done", "bad": "done"} and (tmp_path / "count").read_text() == "xxx"


def test_a_step_ends_with_its_time_and_what_it_measured_is_kept(tmp_path):
    out = tmp_path / "gpu"
    rows = out / "rows" / "slow.jsonl"
    imports = "import time; from benchmarks.gpu.rows import Rows"
    slow = f"{imports}; rows = Rows({str(rows)!r}); rows.add(len(rows.rows), dict(us=1.0)); time.sleep(600)"
    assert not run.execute([step("slow", slow, seconds=8)], out, rehearse=False, seconds=60)
    assert state(out) == {"slow": "cut off"}
    assert Rows(rows).rows == [{"key": 0, "us": 1.0}]
    with tarfile.open(out.with_suffix(".tar.gz")) as tar:
        assert {"gpu/rows/slow.jsonl", "gpu/state.json", "gpu/logs/slow.log"} <= set(tar.getnames())


def test_what_runs_beside_a_step_ends_with_its_time_and_decides_nothing(tmp_path):
    out, done = tmp_path / "gpu", str(tmp_path / "done")
    helpers = [f"open({done!r}, 'w').write('x'); raise SystemExit(3)", "import time; time.sleep(600)"]
    beside = tuple([sys.executable, "-c", code] for code in helpers)
    assert run.execute([step("tests", "pass", seconds=6, beside=beside)], out, rehearse=False, seconds=60)
    assert state(out) == {"tests": "done"} and (tmp_path / "done").exists()
    (tmp_path / "done").unlink()
    assert run.execute([step("rehearsed", "pass", rehearsal=[*beside[0][:2], "pass"], beside=beside)], out, True, 60)
    assert not (tmp_path / "done").exists()


def test_each_network_is_a_row_when_it_is_measured_and_none_is_made_twice(tmp_path, monkeypatch):
    made = []

    def maker(name):
        def make():
            made.append(name)
            if name == "compiled":
                raise KeyboardInterrupt  # cut off
            return lambda: None

        return make

    monkeypatch.setattr(network.common, "medians", lambda steps: [8.0, 2.0][: len(steps)])
    makers = {name: maker(name) for name in ("dense", "frozen", "compiled")}
    rows = Rows(tmp_path / "rows.jsonl")
    with pytest.raises(KeyboardInterrupt):
        for row in network.seconds(makers, rows):
            rows.add((row["model"],), row)
    assert [(row["model"], row["speedup"]) for row in Rows(rows.path).rows] == [("dense", 1.0), ("frozen", 4.0)]
    made.clear()
    makers["compiled"] = lambda: made.append("compiled")
    assert [row["model"] for row in network.seconds(makers, Rows(rows.path))] == ["compiled"]
    assert made == ["dense", "compiled"]


def test_no_step_begins_when_no_time_is_left(tmp_path, capsys):
    assert not run.execute([step("late", "1 / 0")], tmp_path / "gpu", rehearse=False, seconds=1)
    assert "no time is left" in capsys.readouterr().out and not (tmp_path / "gpu" / "state.json").exists()


def test_a_program_that_is_missing_leaves_its_step_out(tmp_path):
    missing = step("memory", "1 / 0", needs="no-such-program")
    assert run.execute([missing], tmp_path / "gpu", rehearse=False, seconds=60)
    assert state(tmp_path / "gpu") == {"memory": "left out"}


def test_a_rehearsal_runs_the_same_steps_with_other_arguments(tmp_path):
    command = step("one", "1 / 0", rehearsal=[sys.executable, "-c", "pass"])
    assert run.execute([command], tmp_path / "gpu", rehearse=True, seconds=60)


@pytest.mark.parametrize(("name", "seconds"), [("first", 480), ("second", 240), ("embeddings", 60), ("images", 300)])
def test_the_runs_fit_their_minutes_and_name_their_steps(name, seconds):
    steps = run.RUNS[name]("out")
    assert sum(one.seconds for one in steps) <= seconds
    assert len({one.name for one in steps}) == len(steps)


def test_the_first_run_measures_the_blocks_that_users_get_beside_the_widest():
    commands = {step.name: step.command for step in run.first("out")}
    assert "--preset" in commands["preset"] and "--preset" not in commands["layers"]


def test_the_first_run_compiles_no_losses():
    """Compiling each loss takes longer than the step may; the second run does."""
    first, second = ({step.name: step.command for step in steps("out")} for steps in (run.first, run.second))
    assert "--no-compile" in first["losses"] and "--no-compile" not in second["losses compiled"]
    assert all(command.count("bfloat16") == 1 for command in (first["losses"], second["losses compiled"]))


def test_a_training_that_was_told_to_stop_has_done_its_part(tmp_path):
    assert run.execute([step("part", "raise SystemExit(75)")], tmp_path / "gpu", rehearse=False, seconds=60)
    assert state(tmp_path / "gpu") == {"part": "done"}


def test_pictures_that_were_not_brought_along_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "DATA", tmp_path / "none")
    assert run.execute(run.images(str(tmp_path)), tmp_path / "gpu", rehearse=False, seconds=60)
    assert set(state(tmp_path / "gpu").values()) == {"left out"}


def test_preparing_names_what_is_missing(tmp_path, monkeypatch):
    """An interpreter that is not there; a package without nvcc; a Triton that cannot be had."""
    assert "no interpreter that runs" in run.prepare(str(tmp_path / "python9"), "3.6.0")[0]
    monkeypatch.setattr(run, "ROOT", tmp_path)
    (tmp_path / "build" / "gpu-wheel").mkdir(parents=True)
    with zipfile.ZipFile(tmp_path / "build" / "gpu-wheel" / f"sparsekd-{run.tag_of(sys.executable)}.whl", "w") as wheel:
        wheel.writestr("sparsekd/_C.so", "")
    ran, real = [], run.subprocess.run

    def outcome(command, **more):
        ran.append(command)
        return real(command, **more) if "-c" in command else mock.Mock(returncode="install" in command)

    monkeypatch.setattr(run.subprocess, "run", outcome)
    missing = run.prepare(sys.executable, "3.6.0")
    assert ["nvcc is not on PATH" in missing[0], "triton==3.6.0 could not be installed" in missing[1]] == [True, True]
    assert not any("gpu.dry_run" in str(command) for command in ran)


def test_rows_survive_a_line_that_was_cut_off(tmp_path):
    rows = Rows(tmp_path / "rows.jsonl")
    rows.add(("layer", 256, 0.3), {"us": 2.0})
    with rows.path.open("a") as file:
        file.write('{"key": ["layer", 256, 0.1], "us"')
    again = Rows(rows.path)
    assert ("layer", 256, 0.3) in again and ("layer", 256, 0.1) not in again
    again.add(("layer", 256, 0.1), {"us": 3.0})
    assert [row["us"] for row in Rows(rows.path).rows] == [2.0, 3.0]
