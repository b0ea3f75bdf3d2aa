"""Every way to call the command wrongly ends in one clear line and exit code 2; a run prints its table."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from threadpoolctl import threadpool_limits

from sparsekd import cli, models, runs
from sparsekd.runs import record
from sparsekd.runs.plans import ratings

from .runs import made_up

run_module = importlib.import_module("sparsekd.runs.run")  # `runs.run` is the function in it


@pytest.fixture
def tiny(monkeypatch) -> Iterator[None]:
    """A synthetic task as the default one, with tiny networks and no timings."""
    task = made_up.make_task()
    monkeypatch.setitem(runs.TASKS, "movietweetings", made_up.entry(task))
    monkeypatch.setattr(ratings, "STUDENT", models.Shape(maps=2, side=8, widths=(16, 16)))
    monkeypatch.setattr(ratings, "TEACHER", models.Shape(maps=2, side=8, widths=(16, 32)))
    monkeypatch.setattr(record, "freeze_for", made_up.as_it_is)
    monkeypatch.setattr(record, "speed", lambda *args: ({"latency_ms_frozen": 1.0, "latency_ms_dense": 2.0}, ""))
    with threadpool_limits(1):  # of torch and of scikit-learn: more would only wait for each other here
        yield


def failure(capsys, *arguments: str) -> str:
    """The one line of an expected failure."""
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.strip().splitlines()
    assert line.startswith("sparsekd: error: ") and "Traceback" not in line
    return line


def test_output_that_nobody_reads_ends_without_a_traceback():
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-m", "sparsekd", "doctor"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=buffered) as process:
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode == 1 and b"Broken" not in said and b"Traceback" not in said


def test_another_broken_pipe_is_an_error(capsys, monkeypatch):
    def broken(*arguments):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(cli, "_doctor", broken)
    assert "Broken pipe" in failure(capsys, "doctor")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["netflix"], "name must be one of movietweetings, movielens, movies, cifar100, sparserec, got 'netflix'"),
        (["movielens", "--data", "/no/such/folder"], "/no/such/folder"),
        (["movies", "--group", "colour"], "group must be one of"),
        (["movietweetings", "--group", "social"], "--group social belongs to the task movies, got movietweetings"),
        (["--density", "0"], "density must lie in (0, 1], got 0.0"),
        (["--density", "0.4", "1.5"], "density must lie in (0, 1], got 1.5"),
        (["--density", "nan"], "density must lie in (0, 1]"),
        (["--method", "dropout"], "sp-sad, lth-sad, ss-sad, kd, at, random, magnitude, "),
        (["--method", "dropout"], ", got 'dropout'"),
        (["cifar100"], "no data_dir was given"),
        (["cifar100", "--student", "vgg"], "student must be one of wrn-40-2"),
        (["cifar100", "--recipe", "best"], "recipe must be one of ours, paper, got 'best'"),
        (["movies", "--protocol", "reduced"], "--protocol reduced belongs to the task cifar100"),
        (["--student", "wrn-16-2"], "--student wrn-16-2 belongs to the task cifar100, got movietweetings"),
        (["--device", "cuda:9"], "no CUDA device can be used here"),
        (["--stop-after", "0"], "stop_after must be more than 0 minutes"),
        (["--seeds", "0"], "seeds must be at least 1, got 0"),
        (["--threads", "-2"], "threads must be at least 1, got -2"),
    ],
)
def test_bad_arguments(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    for name in ("SPARSEKD_DATA", "SPARSEKD_DATA_MOVIES", "SPARSEKD_DATA_MOVIELENS"):
        monkeypatch.delenv(name, raising=False)
    assert message in failure(capsys, "run", *arguments)
    assert not list(tmp_path.iterdir())  # nothing half-written


def test_unknown_options_are_usage_errors(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["run", "--densities", "0.4"])
    assert stop.value.code == 2 and "--densities" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"1::2::3\n", b"\xff\xfe\x00", b"1::2::ten::4\n"])
def test_corrupt_data(capsys, tmp_path, content):
    (tmp_path / "ratings.dat").write_bytes(content)
    (tmp_path / "movies.dat").write_text("2::Heat (1995)::Crime\n")
    assert "ratings.dat" in failure(capsys, "run", "movietweetings", "--data", str(tmp_path))


def test_report_of_nothing(capsys, tmp_path):
    assert "does not exist" in failure(capsys, "report", str(tmp_path / "none"))
    (tmp_path / "results.json").write_text("{")
    assert "results.json is not a result file" in failure(capsys, "report", str(tmp_path))
    nameless = {"schema": 1, "task": {}, "protocol": {}, "baselines": [], "rows": []}
    (tmp_path / "results.json").write_text(json.dumps(nameless))
    line = failure(capsys, "report", str(tmp_path))
    assert f"{tmp_path}/results.json has" in line and "lacks the name of its task" in line


def test_out_that_is_a_file(capsys, tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(run_module.jobs, "fit", lambda *args, **options: pytest.fail("trained before it looked"))
    (tmp_path / "taken").write_text("")
    assert "taken" in failure(capsys, "run", "--quick", "--out", str(tmp_path / "taken"))


@pytest.mark.parametrize("name", ["rows.json", "state.safetensors"])
def test_a_damaged_file_of_an_earlier_run_is_named_with_the_way_out(capsys, tmp_path, tiny, name):
    arguments = ["run", "--quick", "--method", "sp-sad", "--out", str(tmp_path)]
    path = tmp_path / "seed0" / "teacher" / name
    path.parent.mkdir(parents=True)
    path.write_text('[{"name')
    line = failure(capsys, *arguments)
    assert str(path) in line and "delete it to train this network" in line and "--fresh" in line
    assert cli.main([*arguments, "--fresh"]) == 0


def test_full_disk(capsys, tmp_path, tiny, monkeypatch):
    import os

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert "No space left on device" in failure(capsys, "run", "--quick", "--out", str(tmp_path))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_quick_run_prints_its_table_and_report_prints_it_again(capsys, tmp_path, tiny):
    out = tmp_path / "out"
    arguments = ["run", "--quick", "--method", "sp-sad", "ss-sad", "--density", "0.5", "0.3", "--out", str(out)]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    for name in (
        "constant",
        "ridge",
        "gradient boosting",
        "teacher",
        "student",
        "SAD",
        "SP-SAD @ macs=0.5",
        "SS-SAD @ macs=0.3",
    ):
        assert f"\n{name} " in printed
    assert str(out) in printed
    written = {path.name for path in out.iterdir()}
    assert written == {"seed0", "baselines.json", "results.json", "report.md", "report.html"}
    (out / "report.md").unlink()
    assert cli.main(["report", str(out)]) == 0
    assert printed.split("\n\nresults.json")[0].strip().removeprefix("synthetic").strip() in capsys.readouterr().out
    assert (out / "report.md").is_file()


def test_budgets_of_a_run():
    (config,) = cli.configs(["run", "movietweetings", "--budget", "latency_us=80", "latency_us=0.5"])
    assert (config.unit, config.asked(), config.scope) == ("latency_us", (80.0, 0.5), "cost")
    (config,) = cli.configs(["run", "movietweetings", "--unit", "bytes", "--density", "0.3"])
    assert (config.unit, config.asked()) == ("bytes", (0.3,))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "macs=0.5", "--density", "0.5"], "a budget says unit and density"),
        (["--budget", "joules=3"], "--budget takes UNIT=NUMBER with one of weights, macs, bytes, latency_us, got 'j"),
        (["--density", "1.5"], "density must lie in (0, 1], got 1.5"),
    ],
)
def test_budgets_that_a_run_refuses(capsys, tmp_path, tiny, arguments, message):
    assert message in failure(capsys, "run", "--quick", "--out", str(tmp_path / "out"), *arguments)
    assert not (tmp_path / "out").exists()


FACTORY = """
from torch import nn
def small():
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU6(), nn.Conv2d(16, 32, 3), nn.Flatten())
nothing = dict
"""


def test_bench_times_an_own_network(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "own.py").write_text(FACTORY)
    sizes = "--input-shape 3,8,8 --batch 1 2 --threads 1 --density 0.5 0.3 --exclude 0 --seconds 0.05 --json rows.json"
    assert cli.main(["bench", "own:small", *sizes.split()]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [(row["batch"], row["density"]) for row in rows] == [(1, 0.5), (1, 0.3), (2, 0.5), (2, 0.3)]
    printed = capsys.readouterr().out
    for row in rows:
        assert row["layers"] == 2 and row["sparse"] <= 1 and row["left_out"] == {}
        assert min(row["eager_ms"], row["dense_frozen_ms"], row["frozen_ms"]) > 0
        assert [f"{row[key]:.3f}" for key in ("eager_ms", "dense_frozen_ms", "frozen_ms")] in [
            line.split()[8:11] for line in printed.splitlines() if line.startswith(f"{row['budget']} ")
        ]


def test_bench_prunes_to_a_budget(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "own_budget.py").write_text(FACTORY)
    sizes = "--input-shape 3,8,8 --threads 1 --budget macs=0.5 weights=0.4 --scope layer --seconds 0.05 --json r.json"
    assert cli.main(["bench", "own_budget:small", *sizes.split()]) == 0
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert [row["budget"] for row in rows] == ["macs=0.5", "weights=0.4"] and {row["density"] for row in rows} == {None}
    assert [rows[0]["macs"], rows[1]["weights"]] == pytest.approx([0.5, 0.4], abs=0.02)
    printed = capsys.readouterr().out
    for row in rows:
        (words,) = (line.split() for line in printed.splitlines() if line.startswith(row["budget"]))
        assert words[3:5] == [f"{row['weights']:.1%}", f"{row['macs']:.1%}"]


VIEWS = """
from torch import nn
class Views(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3 * 8 * 8, 32)
    def forward(self, x):
        return self.linear(x.view(len(x), -1))
"""


def test_bench_names_what_it_could_not_time(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "viewing.py").write_text(VIEWS)
    sizes = "--input-shape 3,8,8 --batch 2 --threads 1 --density 0.5 --seconds 0.05 --json rows.json"
    assert cli.main(["bench", "viewing:Views", *sizes.split()]) == 0
    (row,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert "view size is not compatible" in row["left_out"]["channels_last"]
    assert "Dense eager without channels_last, which could not run: RuntimeError: view" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["torch.nn.Linear"], "a model must be package.module:factory, got 'torch.nn.Linear'"),
        (["no.such.module:net"], "No module named 'no'"),
        (["torch.nn:Nothing"], "has no attribute 'Nothing'"),
        (["torch.nn:Identity", "--input-shape", "3,x"], "--input-shape takes integers, as in 3,224,224"),
        (["torch.nn:Identity", "--density", "1.5"], "density must lie in (0, 1], got 1.5"),
        (["torch.nn:Identity", "--batch", "0"], "batch must be 1 or more, got [0]"),
        (["torch.nn:Identity", "--seconds", "-1"], "seconds must be a number above 0, got -1"),
        (["torch.nn:Identity", "--seconds", "nan"], "seconds must be a number above 0, got nan"),
        (["torch.nn:Identity", "--budget", "macs"], "--budget takes UNIT=NUMBER with one of weights, macs, bytes"),
        (["torch.nn:Identity", "--budget", "joules=0.5"], "got 'joules=0.5': sparsekd bench: a budget counts one of"),
        (["torch.nn:Linear"], "torch.nn:Linear must be callable without arguments"),
        (["builtins:dict"], "builtins:dict must make an nn.Module, got dict"),
        (
            ["sparsekd.models:MobileNetV2"],
            "does not take inputs of shape [[1, 5]] (the batch, then --input-shape, one for",
        ),
        (["torch.nn:CosineSimilarity"], "one for each input, of floats): "),
        (["torch.nn:Bilinear"], "torch.nn:Bilinear must be callable without arguments"),
    ],
)
def test_bench_says_what_is_wrong(capsys, arguments, message):
    assert message in failure(
        capsys, "bench", *arguments, *([] if "--input-shape" in arguments else ["--input-shape=5"])
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["torch.nn:Identity", "--batch", "0"], "sparsekd export: the batch must be at least 1, got 0"),
        (["Identity"], "sparsekd export: a model must be package.module:factory, got 'Identity'"),
        (["torch.nn:Nothing"], "sparsekd export: expected 'torch.nn:Nothing' to name a function or class to call"),
        (["torch.nn:Linear"], "sparsekd export: torch.nn:Linear must be callable without arguments"),
    ],
)
def test_export_says_what_is_wrong(capsys, tmp_path, arguments, message):
    given = ["--checkpoint", "absent.safetensors", "--input-shape", "5", "--out", str(tmp_path / "out.skd")]
    assert message in failure(capsys, "export", *arguments, *given)


def test_other_settings_do_not_mix(capsys, tmp_path, tiny, monkeypatch):
    arguments = ["run", "--quick", "--method", "sp-sad", "--out", str(tmp_path)]
    assert cli.main(arguments) == 0
    capsys.readouterr()
    monkeypatch.setattr(ratings, "ALPHA", 0.5)
    line = failure(capsys, *arguments, "--threads", "1").replace("\n", " ")
    assert "alpha" in line and "--fresh" in line
    assert cli.main([*arguments, "--fresh"]) == 0


def test_debug_shows_the_traceback():
    with pytest.raises(ValueError, match="name must be one of"):
        cli.main(["--debug", "run", "netflix"])


def test_ctrl_c_says_how_to_go_on(capsys, tmp_path, tiny, monkeypatch):
    def pressed(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module.jobs, "fit", pressed)
    assert cli.main(["run", "--quick", "--out", str(tmp_path)]) == 130
    assert "the same command goes on" in capsys.readouterr().err


def test_doctor(capsys):
    assert cli.main(["doctor"]) == 0
    assert "torch" in capsys.readouterr().out


def test_alone_it_says_what_it_can_do(capsys):
    assert cli.main([]) == 0
    said = capsys.readouterr().out
    assert said.startswith("usage: sparsekd") and "report" in said and "doctor" in said


def test_tables_are_as_wide_as_the_terminal(capsys, tmp_path, monkeypatch):
    """And of several reports each has its name, below what compares them."""
    results = Path(__file__).parents[1] / "benchmarks" / "results"
    files = [str(results / name) for name in ("movietweetings.json", "movies-social.json")]
    for width in (80, 140):
        monkeypatch.setenv("COLUMNS", str(width))
        assert cli.main(["report", *files, "--out", str(tmp_path)]) == 0
        printed = capsys.readouterr().out
        rules = [len(line) for line in printed.splitlines() if set(line) == {"-"}]
        assert width - 20 <= max(rules) <= width
        parts = printed.split("\n== ")
        assert [part.splitlines()[0] for part in parts[1:]] == ["movietweetings", "movies-social"]
        assert "better" in parts[0] and parts[0].count("SS-SAD @ 0.45") == 2


def test_python_dash_m():
    done = subprocess.run([sys.executable, "-m", "sparsekd", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "report" in done.stdout and "doctor" in done.stdout
