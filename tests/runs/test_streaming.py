"""`sparsekd run stream`: arms side by side, a line a window, and nothing lost by a kill at any moment."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch

from sparsekd import checkpoint, cli, report
from sparsekd.data.streams import Columns, DriftingClicks, drift, known
from sparsekd.methods import D2S
from sparsekd.models import DLRM
from sparsekd.runs import streaming
from sparsekd.runs.state import StateFile
from sparsekd.runs.streaming import StreamConfig, load_serving

SMALL = {"widths": (32, 32), "table_rows": 200, "dim": 4, "start": 1, "batch_size": 64}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "clicks.csv"
    drift.write_csv(DriftingClicks("abrupt", windows=4, rows=300, every=2, features=12, active=4), path)
    return path


def config(file, out, **options):
    given = {"data": (str(file),), "window": 1.0, "arms": ("full", "once", "d2s-2"), "remove": (0.8,), "out": str(out)}
    return StreamConfig(**{**SMALL, **given, **options})


def untimed(results):
    for line in results["windows"]:
        for record in line["arms"].values():
            del record["seconds"], record["joules"]
    return results["windows"]


def test_every_arm_is_scored_before_it_learns_and_the_report_says_so(file, tmp_path):
    lines = []
    results, folder = streaming.run(config(file, tmp_path / "out"), lines.append)
    assert [line["rows"] for line in results["windows"]] == [300] * 4 and len(lines) == 5
    assert lines[0].startswith("sparsekd: columns: user (user), item (item), ") and "x0 (number), " in lines[0]
    assert lines[3].startswith("window 3  from 2  300 rows  NE of the full model ") and "once @ 0.8 " in lines[3]
    first = [record["normalised_entropy"] for record in results["windows"][0]["arms"].values()]
    assert max(first) - min(first) < 1e-5  # nobody has learnt anything yet; one arm computes in blocks
    arms = results["arms"]
    assert list(arms) == ["full", "once @ 0.8", "d2s-2 @ 0.8"] and arms["full"]["gap"] == 0.0
    assert arms["once @ 0.8"]["density"] == pytest.approx(0.2, abs=0.02) and arms["full"]["density"] == 1.0
    last = results["windows"][-1]["arms"]["once @ 0.8"]["cumulated"]
    assert arms["once @ 0.8"]["normalised_entropy"] == last["normalised_entropy"]
    total = sum(line["rows"] * line["arms"]["full"]["log_loss"] for line in results["windows"]) / 1200
    assert arms["full"]["log_loss"] == pytest.approx(total)
    assert report.read(folder)["arms"] == arms
    page, text = (folder / "report.html").read_text(), (folder / "report.md").read_text()
    assert page.count("<svg") == 2 and "Gap over time" in page and "| once @ 0.8 " in text
    assert cli.main(["report", str(folder)]) == 0
    with pytest.raises(ValueError, match="streams have a report each"):
        report.merge([folder, folder], tmp_path)


class Kill(Exception):
    pass


def test_resumes_to_the_same_bits_and_with_what_has_been_added(file, tmp_path, monkeypatch):
    whole, _ = streaming.run(config(file, tmp_path / "whole"), str)
    publish = streaming._publish

    def killed(method, folder, number, *rest):
        if number == 3 and isinstance(method, D2S):
            raise Kill  # in the middle: the other arms have published, the state is that of window 2
        publish(method, folder, number, *rest)

    with monkeypatch.context() as patch, pytest.raises(Kill):
        patch.setattr(streaming, "_publish", killed)
        streaming.run(config(file, tmp_path / "stopped"), str)
    assert load_serving(tmp_path / "stopped" / "d2s-2 @ 0.8") is not None
    torch.manual_seed(99)
    said = []
    again, _ = streaming.run(config(file, tmp_path / "stopped"), said.append)
    assert said[1].startswith("sparsekd: going on after window 2") and untimed(again) == untimed(whole)
    for arm in ("full", "once @ 0.8", "d2s-2 @ 0.8"):
        state, other = (load_serving(tmp_path / run / arm).state_dict() for run in ("whole", "stopped"))
        assert state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)
    more = DriftingClicks("abrupt", windows=6, rows=300, every=2, features=12, active=4)
    drift.write_csv(more, tmp_path / "all.csv")
    lines = (tmp_path / "all.csv").read_text().splitlines(keepends=True)
    with file.open("a") as grown:
        grown.writelines(lines[1 + 1200 :])
    longer, _ = streaming.run(config(file, tmp_path / "stopped"), str)
    assert len(longer["windows"]) == 6 and untimed(longer)[:4] == whole["windows"]


def test_other_settings_are_refused_and_fresh_begins_anew(file, tmp_path):
    streaming.run(config(file, tmp_path / "out", limit=2), str)
    with pytest.raises(ValueError, match=r"its lr is 0.001, now 0.01"):
        streaming.run(config(file, tmp_path / "out", lr=0.01), str)
    results, _ = streaming.run(config(file, tmp_path / "out", lr=0.01, limit=1, fresh=True), str)
    assert len(results["windows"]) == 1
    (tmp_path / "out" / "windows.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"has 0 windows and the state 1; put the file back"):
        streaming.run(config(file, tmp_path / "out", lr=0.01), str)


def test_other_columns_are_refused(file, tmp_path):
    streaming.run(config(file, tmp_path / "out", limit=1, arms=("full",), columns=Columns(missing=0.0)), str)
    for columns in (Columns(user="item", item="user", missing=0.0), Columns(missing=9.0)):
        with pytest.raises(ValueError, match=r"its stream is .* give another --out, or --fresh to begin anew"):
            streaming.run(config(file, tmp_path / "out", arms=("full",), columns=columns), str)


def test_a_run_goes_on_with_a_file_that_begins_when_the_last_one_ended(tmp_path):
    (tmp_path / "in").mkdir()
    days = {"day1": range(34), "day2": [33, 33, *range(34, 60)]}
    found = []
    for day, times in days.items():
        rows = [f"{t % 9},{t % 7},{t},{int(t % 3 == 0)},{t % 5}" for t in times]
        (tmp_path / "in" / f"{day}.csv").write_text("\n".join(["user,item,timestamp,label,x", *rows]) + "\n")
        results, _ = streaming.run(config(tmp_path / "in", tmp_path / "out", window=20.0, arms=("full",)), str)
        found.append([line["rows"] for line in results["windows"]])
    assert found == [[20, 14], [20, 14, 8, 20]]


def test_a_file_in_the_place_of_the_folder_is_named(file):
    for out in (file, file / "inside"):
        with pytest.raises(
            NotADirectoryError, match=r"--out needs a folder, and .*clicks\.csv is a file; give another"
        ):
            streaming.run(config(file, out), str)


def test_a_process_that_is_killed_leaves_a_model_that_serves(file, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    command = ["run", "stream", "--data", str(file), "--window", "1", "--out", str(out), "--widths", "32", "32"]
    command += ["--table-rows", "200", "--start", "1", "--arms", "d2s-1", "--remove", "0.8"]
    serving = out / "d2s-1 @ 0.8" / "serving.safetensors"

    def answers():
        return torch.isfinite(load_serving(serving.parent)(torch.zeros(2, 12), torch.zeros(2, 2).long())).all()

    with subprocess.Popen([sys.executable, "-m", "sparsekd", *command], stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not serving.exists():
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    assert answers() and not (out / "results.json").exists()

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(StateFile, "save", interrupted)
        assert cli.main(command) == 130
    assert "Finished windows are kept: the same command goes on from there" in capsys.readouterr().err
    assert answers()
    assert cli.main(command) == 0
    assert "\nd2s-1 @ 0.8 " in capsys.readouterr().out
    assert len((out / "windows.jsonl").read_text().splitlines()) == 4
    assert checkpoint.metadata(serving)["window"] == 4


def test_a_window_of_one_class_counts_in_the_sums_alone(tmp_path):
    rows = [f"{n % 9},{n % 7},{n},{int(n // 50 != 1 and n % 3 == 0)},{n % 5}" for n in range(150)]
    (tmp_path / "a.csv").write_text("\n".join(["user,item,timestamp,label,x", *rows]) + "\n")
    lines = []
    results, _ = streaming.run(config(tmp_path / "a.csv", tmp_path / "out", window=50.0), lines.append)
    of_full = [line["arms"]["full"] for line in results["windows"]]
    assert [record["normalised_entropy"] is None for record in of_full] == [False, True, False]
    assert of_full[1]["log_loss"] > 0 and "one class only" in lines[2]
    total = sum(record["log_loss"] for record in of_full) / 3
    assert of_full[2]["cumulated"]["log_loss"] == pytest.approx(total)
    assert results["arms"]["full"]["auc"] is not None


def test_models_tables_and_units(file, tmp_path):
    options = {"model": "dlrm", "table": "sparse", "ids": "listed", "unit": "macs", "arms": ("full", "d2s-1")}
    results, folder = streaming.run(config(file, tmp_path / "out", limit=2, **options), str)
    model = load_serving(folder / "d2s-1 @ 0.8")
    assert isinstance(model, DLRM) and not model.training
    assert results["protocol"]["unit"] == "macs"


def test_the_command_takes_columns_by_other_names(tmp_path, capsys):
    rows = [f"{n % 9},{n % 7},{n},{n % 10},{n % 5}" for n in range(100)]
    (tmp_path / "a.csv").write_text("\n".join(["who,what,when,stars,x", *rows]) + "\n")
    names = ["--user", "who", "--item", "what", "--timestamp", "when", "--label", "stars", "--click-at", "8"]
    command = ["run", "stream", "--data", str(tmp_path / "a.csv"), *names, "--rows", "50", "--widths", "32"]
    assert cli.main([*command, "--arms", "full", "--out", str(tmp_path / "out")]) == 0
    assert "\nfull " in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "results.json").read_text())["stream"]["click_at"] == 8.0
    clicked = ["run", "stream", "--data", str(tmp_path / "a.csv"), *names[:6], "--no-label", "--rows", "50"]
    assert cli.main([*clicked, "--widths", "32", "--arms", "full", "--out", str(tmp_path / "clicked")]) == 0
    assert cli.main(["run", "stream", "--data", str(tmp_path / "none.csv")]) == 2
    assert "none.csv does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        ({"arms": ("d2s-3",)}, "arm must be one of full, once"),
        ({"remove": (1.0,)}, "remove takes shares between 0 and 1"),
        ({"model": "x"}, "model must be one of dlrm, wide-deep"),
        ({"stream": "x"}, "the stream must be one of movietweetings"),
        ({"start": 0}, "start must be at least 1"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"table_rows": 0}, "table_rows must be at least 1, got 0"),
        ({"lr": -1.0}, r"lr must be a finite number above 0, .* got -1\.0 and 0\.0"),
        ({"lr": float("nan")}, "lr must be a finite number above 0"),
        ({"weight_decay": -1.0}, "weight_decay one of 0 or more"),
    ],
)
def test_what_means_nothing_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        StreamConfig(**options)
    with pytest.raises(ValueError, match="name must be one of movietweetings"):
        known("nowhere")
    with pytest.raises(ValueError, match="each column has one meaning, got user twice"):
        Columns(item="user")
