"""A run trains, measures, reports, goes on where it was stopped, and mixes nothing up."""

import copy
import dataclasses
import importlib
import json
import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from sparsekd import checkpoint, report, runs
from sparsekd.backends import cpu
from sparsekd.goals import predict
from sparsekd.pruning import CostTable, LayerCost, Pruner
from sparsekd.pruning.cost import network_of
from sparsekd.runs import OutOfTime, RunConfig, record
from sparsekd.runs.state import StateFile
from sparsekd.runs.tasks import plan_of

from .made_up import errors, student_of, teacher_of, without_timings
from .made_up import network as made_up_network

run_module = importlib.import_module("sparsekd.runs.run")  # `runs.run` is the function in it


def test_other_precision_or_device_is_refused_but_may_measure_again(task, tmp_path, monkeypatch):
    config = RunConfig("synthetic", methods=(), quick=True, out=str(tmp_path), bf16=True, measure=False)
    one_epoch = dataclasses.replace(config, stop_after=1e-6)
    with pytest.raises(OutOfTime):
        runs.run(one_epoch, lambda line: None)
    float32 = dataclasses.replace(config, bf16=False)
    with pytest.raises(ValueError, match=r"state\.safetensors is of another run: its bf16 is True, now False"):
        runs.run(float32, lambda line: None)
    runs.run(config, lambda line: None)
    with pytest.raises(ValueError, match=r"rows\.json is of another run: its bf16 is True, now False"):
        runs.run(float32, lambda line: None)
    again, _ = runs.run(dataclasses.replace(float32, remeasure=True), lambda line: None)
    assert {row["settings"]["bf16"] for row in again["rows"]} == {True}
    assert again["protocol"]["precision"] == "training and validation in bf16 autocast; test in float32"

    for path in tmp_path.rglob("rows.json"):  # as they were before there was such a setting
        rows = json.loads(path.read_text())
        for key in ("device", "bf16", "ranks"):
            del rows[0]["settings"][key]
        path.write_text(json.dumps(rows))
    for call in (config, float32, dataclasses.replace(config, remeasure=True)):
        assert "bf16" not in runs.run(call, lambda line: None)[0]["rows"][0]["settings"]


@pytest.mark.parametrize(
    ("unit", "scope", "kept"), [("macs", "cost", "macs_kept"), ("weights", "layer", "weights_kept")]
)
def test_a_run_counts_in_its_unit(task, untimed, tmp_path, unit, scope, kept):
    methods = ("lth-sad", "ss-sad")
    config = RunConfig(
        "synthetic", methods=methods, densities=(0.4,), unit=unit, scope=scope, quick=True, pattern="4x1"
    )
    results, _ = runs.run(dataclasses.replace(config, out=str(tmp_path)), lambda line: None)
    dense, *pruned = results["rows"][2:]
    assert dense["metrics"]["macs_kept"] == dense["metrics"]["weights_kept"] == 1.0
    for row in pruned:
        metrics, settings = row["metrics"], row["settings"]
        assert metrics[kept] == pytest.approx(0.4, abs=0.03)
        assert metrics["macs"] == pytest.approx(metrics["macs_kept"] * dense["metrics"]["macs"])
        assert settings["options"]["scope"] == scope and settings["schedule"].get("unit", "weights") == unit
    assert ("macs" in results["protocol"]["students"]["lth-sad-0.4"]) == (unit == "macs")
    text = (tmp_path / "report.md").read_text()
    assert f" {100 * pruned[0]['metrics']['macs_kept']:.1f} |" in text and "multiply-adds kept %" in text


@pytest.mark.parametrize(("score", "titled"), [("magnitude", "LTH-SAD at once"), ("snip", "LTH-SAD at once by snip")])
def test_a_run_prunes_before_the_first_step(task, untimed, tmp_path, score, titled):
    """The ticket of SS-SAD has no teacher, and so no gradient behind a head of zeros: the first weights judge."""
    methods = ("lth-sad", "ss-sad")
    config = RunConfig("synthetic", methods=methods, densities=(0.4,), quick=True, pattern="4x1", out=str(tmp_path))
    results, _ = runs.run(dataclasses.replace(config, at_once=score), lambda line: None)
    pruned = results["rows"][3:]
    assert [row["name"] for row in pruned] == [titled, "SS-SAD at once"]
    for row in pruned:
        assert row["metrics"]["macs_kept"] == pytest.approx(0.4, abs=0.03)
        densities = [epoch["density"] for epoch in row["epochs"]]
        assert densities[0] < 0.9 and (densities[0] == densities[-1] or row["name"].startswith("SS"))
        options = row["settings"]["options"]
        assert options.get("first_score") == ("snip" if "snip" in row["name"] else None)
        assert [epoch.get("pruned_before", False) for epoch in row["epochs"]] == [True] + 5 * [False]
        assert row["epochs"][0]["rewound"] is False


def test_units_and_costs_that_do_not_fit_are_refused():
    for fields, says in (
        ({"unit": "joules"}, "a budget counts one of weights"),
        ({"costs": "costs.json"}, "got unit None and costs costs.json"),
        ({"unit": "macs", "costs": "costs.json"}, "belongs to the unit latency_us, got unit macs and costs costs.json"),
        (
            {"budgets": ("macs=0.5",), "densities": (0.5,)},
            "a budget says unit and density, got unit None and densities",
        ),
        ({"budgets": ("macs=0.5",), "unit": "bytes"}, "got unit bytes and densities None beside macs=0.5"),
        ({"budgets": ("macs=0.5", "bytes=9")}, "all budgets of a run count the same, got bytes and macs"),
        ({"budgets": ("macs=inf",)}, "a number of multiply-adds above 1, got inf"),
        ({"scope": "everywhere"}, "scope must be one of global, layer, cost, got 'everywhere'"),
    ):
        with pytest.raises(ValueError, match=says):
            RunConfig(**fields)


def test_a_run_is_pruned_to_a_number(task, untimed, tmp_path):
    config = RunConfig("synthetic", methods=("sp-sad",), quick=True, pattern="4x1", out=str(tmp_path))
    dense = runs.run(config, lambda line: None)[0]["rows"][2]["metrics"]["macs"]
    said = []
    results, _ = runs.run(dataclasses.replace(config, budgets=(f"macs={0.4 * dense!r}",)), said.append)
    row = results["rows"][3]
    assert row["metrics"]["macs"] == pytest.approx(0.4 * dense, rel=0.03) and row["target_density"] == pytest.approx(
        0.4
    )
    assert row["budget"] == f"macs={0.4 * dense:g}" and f"SP-SAD @ macs={0.4 * dense:g}: " in said[-1]
    assert f"SP-SAD @ macs={0.4 * dense:g} " in (tmp_path / "report.md").read_text()
    with pytest.raises(ValueError, match=r"macs=1e\+12 is to stay, but the dense student has only"):
        runs.run(dataclasses.replace(config, budgets=("macs=1e12",)), lambda line: None)


def test_costs_are_measured_once_where_none_are_given(task, untimed, tmp_path, monkeypatch):
    measured = []

    def measure(model, inputs, *, pattern, exclude, layer_ms):
        measured.append(inputs[0].shape[0])
        layers = Pruner(copy.deepcopy(model), pattern=pattern, exclude=exclude).layers()
        costs = {name: LayerCost(str(pattern), 10.0, (0.1, 0.5), (1.0, 5.0)) for name in layers}
        isa = "none" if cpu.native is None else cpu.native.isa()
        return CostTable("here", isa, 1, 1, ((1, 6),), "float32", "float32", network_of(model), 2.0, costs)

    monkeypatch.setattr(CostTable, "measure", staticmethod(measure))
    monkeypatch.setattr(CostTable, "load", partial(CostTable.load, of_this_machine=False))
    config = RunConfig("synthetic", methods=("sp-sad",), budgets=("latency_us=0.5", "latency_us=20"), quick=True)
    config = dataclasses.replace(config, pattern="4x1", out=str(tmp_path))
    results, _ = runs.run(config, lambda line: None)
    dense = CostTable.load(tmp_path / "costs.json").dense_us
    for row, name, us in zip(
        results["rows"][3:], ("latency_us=0.5", "latency_us=20"), (0.5 * dense, 20.0), strict=True
    ):
        assert row["budget"] == name and row["metrics"]["predicted_us"] == pytest.approx(us, rel=0.05)
    results["rows"][3]["metrics"]["latency_ms_dense"] = 1.0
    table = report.result_tables({**results, "summary": None})
    assert " predicted |" in table and " 0.020 |" in table
    runs.run(config, lambda line: None)
    assert measured == [1]


def test_costs_are_read_before_anything_is_trained(task, tmp_path, monkeypatch):
    monkeypatch.setattr(run_module.jobs, "fit", None)
    path, network = tmp_path / "costs.json", student_of(task)
    config = RunConfig("synthetic", methods=("sp-sad",), unit="latency_us", costs=str(path), out=str(tmp_path / "out"))
    with pytest.raises(FileNotFoundError, match=r"costs\.json does not exist"):
        runs.run(config, lambda line: None)
    isa = "none" if cpu.native is None else cpu.native.isa()
    layers = {"cnn.stem.0": LayerCost("16x1", 10.0, (0.5,), (6.0,))}
    shapes = network_of(teacher_of(task))  # not those of the student
    CostTable("here", isa, 1, 1, ((1, 6),), "float32", "float32", shapes, 1.0, layers).save(path)
    if cpu.native is not None:
        with pytest.raises(ValueError, match="expected the costs of this network"):
            runs.run(config, lambda line: None)
    assert network_of(network) != shapes and not (tmp_path / "out").exists()


def test_a_table_of_costs_goes_by_what_it_says(task, tmp_path):
    """A run that was stopped does not go on with other costs, and does with the same ones from another place."""
    places = [tmp_path / name for name in ("a.json", "b.json")]
    for path in places:
        path.write_text("the same")
    first, elsewhere = (made_up_network("sp-sad", costs=str(path)).settings() for path in places)
    assert first == elsewhere
    places[0].write_text("another")
    assert made_up_network("sp-sad", costs=str(places[0])).settings() != first
    assert "costs" not in made_up_network("sp-sad").settings()  # files are as large as before there were any


def test_the_published_recipe_counts_weights(tiny, folder):
    config = runs.several(RunConfig("cifar100", str(folder), {"recipe": "paper"}, quick=True, unit="macs"))[0]
    with pytest.raises(ValueError, match="the published recipe counts weights"):
        plan_of(None, config)


def test_run_measures_the_frozen_student(task, tmp_path, monkeypatch):
    config = RunConfig("synthetic", methods=("lth-sad",), quick=True, out=str(tmp_path / "out"))
    results, folder = runs.run(config, lambda line: None)
    assert folder == tmp_path / "out"
    assert [row["name"] for row in results["rows"]] == ["teacher", "student", "SAD", "LTH-SAD"]
    metrics = results["rows"][3]["metrics"]
    assert metrics["macs_kept"] == pytest.approx(0.45, abs=0.03)
    assert metrics["frozen_difference"] <= 1e-3
    saved = checkpoint.load(student_of(task), folder / "seed0/lth-sad-0.45/model.safetensors")
    mse = float((predict(saved, task.test).clamp(1, 10) - task.test.target).square().mean())
    assert metrics["mse"] == pytest.approx(mse, rel=1e-6)
    dense = results["rows"][2]["metrics"]
    assert metrics["file_bytes"] < dense["file_bytes"] and metrics["parameters"] < dense["parameters"]
    for name in ("latency_ms_{}", "throughput_{}_64"):
        assert metrics[name.format("dense")] > 0 and metrics[name.format("frozen")] > 0
    assert {"constant", "ridge", "gradient boosting"} <= {score["name"] for score in results["baselines"]}
    assert not list(folder.rglob("state.safetensors"))


def test_run_goes_on_adds_seeds_and_starts_afresh(task, tmp_path, monkeypatch, untimed):
    config = RunConfig("synthetic", methods=("lth-sad",), quick=True, out=str(tmp_path))
    said = []
    first, _ = runs.run(config, said.append)
    assert sum("LTH-SAD @ macs=0.45" in line for line in said) == 1
    two, _ = runs.run(dataclasses.replace(config, seeds=2), said.append)
    assert [row["seed"] for row in two["rows"]] == [0] * 4 + [1] * 4
    assert two["rows"][:4] == first["rows"]
    with monkeypatch.context() as patch:  # finished networks are not trained again
        patch.setattr(run_module.jobs, "fit", None)
        again, _ = runs.run(dataclasses.replace(config, seeds=2), said.append)
        patch.setattr(record, "speed", lambda *args: ({"latency_ms_dense": 2.0, "latency_ms_frozen": 1.0}, "a counter"))
        timed, _ = runs.run(dataclasses.replace(config, seeds=2, remeasure=True), said.append)
    assert again["rows"] == two["rows"]
    for before, after in zip(two["rows"], timed["rows"], strict=True):
        assert after["metrics"] == {**before["metrics"], "latency_ms_dense": 2.0, "latency_ms_frozen": 1.0}
        assert after["epochs"] == before["epochs"] and after["energy_note"] == "a counter"
    fresh, _ = runs.run(dataclasses.replace(config, fresh=True), said.append)
    assert not (tmp_path / "seed1").exists() and len(fresh["rows"]) == 4
    assert fresh["rows"][3]["metrics"]["mse"] == first["rows"][3]["metrics"]["mse"]


class Nearly(torch.nn.Module):
    """A network that has been frozen badly, yet within the tolerance."""

    plan = SimpleNamespace(to_dict=lambda: {"layers": []})

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *inputs):
        return self.model(*inputs) + 5e-4


def test_test_errors_are_those_of_the_trained_network_in_float32(task, tmp_path, monkeypatch, untimed):
    monkeypatch.setattr(record, "freeze_for", lambda model, *args: {1: Nearly(model)})
    config = RunConfig("synthetic", methods=(), quick=True, out=str(tmp_path), bf16=True, measure=False)

    def check(results):
        for row in results["rows"]:
            saved = (teacher_of if row["name"] == "teacher" else student_of)(task)
            checkpoint.load(saved, tmp_path / f"seed0/{row['settings']['folder']}/model.safetensors")
            assert errors(saved, task, task.test).items() <= row["metrics"].items()
        return results

    untouched = check(runs.run(config, lambda line: None)[0])
    assert "latency_ms_dense" not in untouched["rows"][0]["metrics"]
    monkeypatch.setattr(run_module.jobs, "fit", None)  # nothing is trained again
    measured = check(runs.run(dataclasses.replace(config, measure=True, remeasure=True), lambda line: None)[0])
    assert measured["rows"][0]["metrics"]["frozen_difference"] == pytest.approx(5e-4, rel=0.01)

    path = tmp_path / "seed0/sad/rows.json"
    path.write_text(json.dumps([{**row, "metrics": {**row["metrics"], "mse": 0.0}} for row in measured["rows"][-1:]]))
    monkeypatch.setattr(record, "freeze_for", None)  # nor timed
    again = check(runs.run(dataclasses.replace(config, remeasure=True), lambda line: None)[0])
    assert again["rows"] == measured["rows"]


def test_fewer_methods_keep_the_rows_of_the_others(task, tmp_path, monkeypatch):
    config = RunConfig("synthetic", methods=("kd", "at"), quick=True, out=str(tmp_path), measure=False)
    both, _ = runs.run(config, lambda line: None)
    shutil.copytree(tmp_path / "seed0/at", tmp_path / "seed0/foreign")
    path = tmp_path / "seed0/foreign/rows.json"
    path.write_text(path.read_text().replace('"train_rows": 256', '"train_rows": 100').replace('"at"', '"foreign"'))
    for name in ("kd", "at"):
        one, _ = runs.run(dataclasses.replace(config, methods=(name,)), lambda line: None)
        assert sorted(map(json.dumps, one["rows"])) == sorted(map(json.dumps, both["rows"]))
    assert one["protocol"]["students"]["kd"] == "of another call, see its settings in results.json"
    assert one["protocol"]["students"]["at"] == both["protocol"]["students"]["at"]


def test_ctrl_c_keeps_what_is_finished(task, tmp_path, monkeypatch, untimed):
    config = RunConfig("synthetic", methods=("sp-sad",), quick=True, out=str(tmp_path))
    save = StateFile.save

    def pressed(self, history):
        save(self, history)
        if "sp-sad" in str(self.path) and len(history) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(StateFile, "save", pressed)
        with pytest.raises(KeyboardInterrupt):
            runs.run(config, lambda line: None)
    assert (tmp_path / "seed0/sad/rows.json").is_file()
    state = checkpoint.load_state(tmp_path / "seed0/sp-sad-0.45/state.safetensors")
    assert len(state["history"]) == 2
    stopped, _ = runs.run(config, lambda line: None)
    whole, _ = runs.run(dataclasses.replace(config, out=str(tmp_path / "whole")), lambda line: None)
    for left, right in zip(stopped["rows"], whole["rows"], strict=True):
        assert without_timings(left["epochs"]) == without_timings(right["epochs"])
        assert left["metrics"]["mse"] == right["metrics"]["mse"]


def test_baselines_get_the_data_where_it_was_loaded(task, tmp_path, monkeypatch):
    """numpy cannot read what lies on a GPU, where a run may have taken it; "meta" stands for one here."""

    class Asked(Exception):
        pass

    def asked(given):
        raise Asked(given.train.target.device.type)

    monkeypatch.setattr(run_module, "start", lambda *_: runs.Runtime("meta"))
    monkeypatch.setattr(run_module.baselines, "run", asked)
    # No student, so nothing to prune by costs.
    plans = {"meta": SimpleNamespace(students=(), architectures={}, views=0)}
    monkeypatch.setattr(run_module.tasks, "plan_of", lambda moved, _: plans[moved.train.target.device.type])
    with pytest.raises(Asked, match="cpu"):
        runs.run(RunConfig("synthetic", quick=True, out=str(tmp_path)), lambda line: None)


def test_fresh_leaves_other_files(tmp_path):
    (tmp_path / "seed0").mkdir()
    (tmp_path / "seedlings.txt").write_text("mine")
    for name in ("results.json", "baselines.json"):
        (tmp_path / name).write_text(json.dumps({}))
    run_module.clear(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["seedlings.txt"]
