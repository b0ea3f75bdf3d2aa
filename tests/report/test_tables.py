"""The report says what the JSON says, and nothing else."""

import json
from pathlib import Path

import pytest

from sparsekd import report
from sparsekd.goals import Classification, Click, Metric, Ranking, Regression
from sparsekd.runs.plans import paper

MSE = Regression().judge


def row(name, seed, density=None, **metrics):
    base = {
        "mae": 1.0,
        "mse": 2.0,
        "weights_kept": density or 1.0,
        "parameters": 1000,
        "file_bytes": 4321,
        "train_seconds": 12.5,
        "step_ms_first": 20.0,
        "step_ms_last": 10.0,
        "latency_ms_dense": 3.0,
        "latency_ms_frozen": 1.0,
        "latency_ratio": 0.3333,
        "throughput_dense_64": 1000.0,
        "throughput_frozen_64": 4000.0,
        "joules_dense": None,
        "joules_frozen": None,
    }
    epochs = [
        {"epoch": 1, "task": 2.5, "val_mse": 2.4, "density": 1.0, "pruned": density is not None},
        {"epoch": 2, "task": 2.2, "val_mse": 2.3, "density": density or 1.0, "pruned": False},
    ]
    return {
        "name": name,
        "method": name.lower(),
        "seed": seed,
        "target_density": density,
        "metrics": {**base, **metrics},
        "epochs": epochs,
        "energy_note": "not measured: no counter here",
    }


@pytest.fixture
def results():
    return {
        "schema": 1,
        "command": "sparsekd run movies --data DIR",
        "task": {"name": "movies-social", "goal": Regression().describe(), "sha256": {"a.csv": "00ff"}},
        "protocol": {"epochs": {"student": 2}, "seeds": [0, 1]},
        "baselines": [{"name": "ridge", "mae": 0.7654, "mse": 1.2345, "setting": "alpha 10"}],
        "published": {**paper.TABLE_4["social"], "chosen_on_test": False},
        "rows": [
            row("teacher", 0, mse=1.5),
            row("teacher", 1, mse=1.7),
            row("LTH-SAD", 0, 0.45, mae=0.81, mse=1.1),
            row("LTH-SAD", 1, 0.45, mae=0.83, mse=1.3),
            row("LTH-SAD", 0, 0.2, mse=1.4),
            row("LTH-SAD", 1, 0.2, mse=1.6, train_seconds=None),
        ],
    }


def test_mean_and_deviation_over_seeds(results):
    teacher, lth, thinner = report.summarise(results["rows"], MSE)
    assert (teacher["name"], teacher["seeds"]) == ("teacher", [0, 1])
    assert teacher["mean"]["mse"] == pytest.approx(1.6) and teacher["sd"]["mse"] == pytest.approx(0.02**0.5)
    assert lth["mean"]["mae"] == pytest.approx(0.82) and lth["target_density"] == 0.45
    assert thinner["mean"]["train_seconds"] is None and thinner["sd"]["train_seconds"] is None
    assert lth["mean"]["joules_dense"] is None


def test_one_seed_has_no_deviation(results):
    (entry,) = report.summarise(results["rows"][:1], MSE)
    assert entry["mean"]["mse"] == 1.5 and entry["sd"]["mse"] is None


@pytest.mark.parametrize(
    ("judge", "sign"), [(Classification().judge, 1), (Regression().judge, -1), (Click().judge, -1)]
)
def test_the_density_is_selected_on_the_validation_part(judge, sign):
    """Whatever the test part says, which here has another favourite."""
    name = judge.name
    scored = {0.5: (0.70, 0.60), 0.4: (0.68, 0.65), 0.3: (0.72, 0.61)}  # test, validation
    rows = [
        row("SP-SAD", seed, density, **{name: sign * (test + 0.01 * seed), f"val_{name}": sign * (val - 0.01 * seed)})
        for density, (test, val) in scored.items()
        for seed in (0, 1)
    ]
    rows += [row("SAD", 0, **{name: sign * 0.8, f"val_{name}": sign * 0.8})]
    selected = {
        (entry["name"], entry["target_density"]) for entry in report.summarise(rows, judge) if entry["selected"]
    }
    assert selected == {("SP-SAD", 0.4)}


def cells(text, first):
    line = next(line for line in text.splitlines() if line.startswith(f"| {first} "))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_tables_hold_the_numbers_of_the_json(results):
    text = report.result_tables(results)
    assert cells(text, "ridge (alpha 10)")[1:3] == ["1.2345", "0.7654"]
    lth = cells(text, "LTH-SAD @ 0.45")
    assert lth[1:4] == ["1.2000 ± 0.1414", "0.8200 ± 0.0141", "45.0 ± 0.0"]
    assert cells(text, "LTH-SAD @ 0.2")[6] == "not measured"
    speed = cells(text[text.index("latency") :], "teacher")
    assert speed[1:4] == ["3.000 ± 0.000", "1.000 ± 0.000", "0.33 ± 0.00"]
    assert speed[-2:] == ["not measured", "not measured"]
    assert "Energy: not measured: no counter here." in text
    assert cells(text[text.index("Table 4") :], "LTH-SAD")[1:] == ["1.1060", "0.8100"]
    assert len({len(line) for line in text.splitlines() if "ridge" in line or "LTH-SAD @" in line}) == 2  # aligned


def test_figures_chosen_on_test_stand_beside_ours_chosen_on_test_and_say_so(results):
    """The density that is best on test may be another than validation chooses; one density is no choice."""
    results["published"] = paper.TABLE_4["social"]
    results["rows"] = [row("LTH-SAD", 0, 0.45, mae=0.81, mse=1.1), row("LTH-SAD", 0, 0.2, mae=0.8, mse=1.05)]
    results["rows"].append(row("SP-SAD", 0, 0.45, mse=1.0))
    text = report.result_tables(results)
    ours = [line for line in text[text.index("Table 4") :].splitlines() if "chosen on test" in line]
    assert len(ours) == 1
    assert cells(ours[0], "ours, density chosen on test: LTH-SAD @ 0.2")[1:] == ["1.0500", "0.8000"]
    results["published"] = {**results["published"], "chosen_on_test": False}
    assert "chosen on test" not in report.result_tables(results)


def test_other_tasks_have_no_row_of_the_paper(results):
    del results["published"]
    assert "Table 4" not in report.result_tables(results)


def test_write_and_render_again(results, tmp_path):
    paths = report.write(results, tmp_path)
    assert [path.name for path in paths] == ["results.json", "report.md", "report.html"]
    stored = json.loads((tmp_path / "results.json").read_text())
    assert stored["rows"] == results["rows"] and stored["summary"] == report.summarise(results["rows"], MSE)
    first = (tmp_path / "report.md").read_text()
    assert "00ff" in first and results["command"] in first
    (tmp_path / "report.md").unlink()
    report.write(report.read(tmp_path), tmp_path)
    assert (tmp_path / "report.md").read_text() == first


@pytest.mark.parametrize("content", ["", "not json", "[]", '{"schema": 9}', '{"schema": 1, "rows": []}'])
def test_no_result_file(tmp_path, content):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(ValueError, match=r"results\.json"):
        report.read(tmp_path)


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        report.read(tmp_path / "nothing")


def test_a_metric_that_nobody_knew_is_drawn_from_its_description(results, tmp_path):
    """A goal of tomorrow: its name, heading, scale and direction stand in results.json, and nowhere else."""
    hits = Metric("hits@3", "test hits@3, %", 100.0, 1, higher_is_better=True)
    results["task"]["goal"] = {"name": "of tomorrow", "metrics": [hits.describe()]}
    results["baselines"], results["published"] = (
        [{"name": "popular", "hits@3": 0.125}],
        {"heading": "Theirs:", "rows": {"they": {"hits@3": 0.5}}},
    )
    results["rows"] = [
        row("SP-SAD", 0, density, **{"hits@3": share, "val_hits@3": share})
        for density, share in ((0.5, 0.3), (0.4, 0.4))
    ]
    for one in results["rows"]:
        one["epochs"] = [{"epoch": 1, "val_hits@3": 0.2, "density": 1.0, "pruned": False}]
    report.write(results, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert (
        cells(text, "popular")[1] == "12.5"
        and cells(text, "they")[1] == "50.0"
        and cells(text, "SP-SAD @ 0.4")[1] == "40.0"
    )
    chosen = {entry["target_density"] for entry in report.read(tmp_path)["summary"] if entry["selected"]}
    assert chosen == {0.4}
    page = (tmp_path / "report.html").read_text()
    assert "test hits@3, % against weights kept" in page and "validation hits@3, % against epoch" in page


@pytest.mark.parametrize(("kind", "judge"), [("ratings", "mse"), ("features", "mse"), ("images", "accuracy")])
def test_files_from_before_there_were_goals_are_read(results, tmp_path, kind, judge):
    results["task"] = {"name": "old", "kind": kind}
    results["rows"] = [{**row("SAD", 0, accuracy=0.5, val_accuracy=0.5, val_mse=1.0), "epochs": []}]
    (tmp_path / "results.json").write_text(json.dumps(results))
    old = report.read(tmp_path)
    assert report.metrics_of(old)[0].name == judge
    report.write(old, tmp_path)


@pytest.mark.parametrize("path", sorted((Path(__file__).resolve().parents[2] / "benchmarks/results").glob("*.json")))
def test_stored_results_of_runs_are_readable(path, tmp_path):
    stored = json.loads(path.read_text())
    if not isinstance(stored, dict) or "baselines" not in stored:
        return  # of a benchmark, not of a run
    report.merge([path], tmp_path)
    assert stored["task"]["name"] in (tmp_path / "report.md").read_text()


def test_a_goal_without_metrics_is_refused(results, tmp_path):
    results["task"]["goal"] = {"name": "empty", "metrics": []}
    (tmp_path / "results.json").write_text(json.dumps(results))
    with pytest.raises(ValueError, match=r"results\.json does not say what its numbers are"):
        report.read(tmp_path)


def test_a_table_for_a_terminal_goes_on_below_itself():
    """Behind its first column; what was nowhere measured, and rows that say nothing there, are left out."""
    heading = ["model", "test MSE", "a heading of words", "nothing", "kept %"]
    rows = [
        ["base", "1.0", "0.5", "not measured", ""],
        ["a name that is rather long, indeed", "2.0", "0.25", "not measured", "45.0"],
    ]
    assert report.text_table(heading, rows, 44).splitlines() == [
        "                                 a heading",
        "model                  test MSE   of words",
        "------------------------------------------",
        "base                        1.0        0.5",
        "a name that is rather",
        "  long, indeed              2.0       0.25",
        "",
        "model                  kept %",
        "-----------------------------",
        "a name that is rather",
        "  long, indeed           45.0",
    ]
    assert report.text_table(heading, rows, 60).splitlines()[1] == "model                  test MSE   of words  kept %"


def test_a_terminal_shows_metrics_at_one_cutoff(results, tmp_path):
    """All of them are in report.md, and where a run has no others nothing is said."""
    assert "report.md" not in report.for_terminal([results])
    results["task"]["goal"] = Ranking(cutoffs=(5, 20)).describe()
    results["baselines"] = []
    for one in results["rows"]:
        one["metrics"] |= {f"{name}@{k}": 0.01 * k for name in ("ndcg", "recall", "hr", "mrr") for k in (5, 20)}
        for epoch in one["epochs"]:
            epoch["val_ndcg@20"] = 0.2
    text = report.for_terminal([results])
    assert "recall@20" in text and "@5" not in text
    assert text.endswith("Metrics at other cutoffs: report.md.")
    written = report.write(results, tmp_path)
    assert "recall@20" in written[1].read_text() and "recall@5" in written[1].read_text()


def test_a_protocol_says_once_what_several_have_alike(results, tmp_path):
    results["protocol"] |= {
        "students": {"a": "two epochs", "b": "two epochs", "c": "one epoch"},
        "versions": {"torch": "2.13.0", "python": "3.11"},
        "not_pruned": [],
        "quick": False,
    }
    text = report.write(results, tmp_path)[1].read_text()
    assert "- students: a, b: two epochs; c: one epoch\n" in text
    assert "- versions: torch 2.13.0; python 3.11\n" in text
    assert "- not pruned: none\n" in text and "- quick: no\n" in text
    assert "- goal: regression, judged by MSE\n" in text
