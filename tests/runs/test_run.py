"""The loop learns, prunes to the target, and goes on after a kill as if nothing had happened."""

import dataclasses
import importlib
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_limits

from sparsekd import checkpoint, data, models
from sparsekd.data import Recipe, Rows, Task
from sparsekd.runs import epochs as loop
from sparsekd.runs import evaluate, recipes

train = importlib.import_module("sparsekd.runs.run")  # the module, whose name `runs.run` is the function

RECIPE = Recipe(lr=3e-3, weight_decay=1e-2, epochs=4, batch_size=64, dropout=0.1)


def part(rows: int, seed: int) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 6, generator=generator)
    y = (5 + x[:, 0] + x[:, 1] * x[:, 2] + 0.1 * torch.randn(rows, generator=generator)).clamp(1, 10)
    return Rows((x,), y, x.numpy())


@pytest.fixture
def task() -> Task:
    train_part = part(256, 0)
    return Task(
        name="synthetic",
        kind="features",
        train=train_part,
        val=part(128, 1),
        test=part(128, 2),
        sizes={"features": 6},
        mean=float(train_part.target.mean()),
        target_range=(1.0, 10.0),
        split="at random",
        teacher_recipe=RECIPE,
        student_recipe=RECIPE,
        meta={"sha256": {"synthetic": "0" * 64}},
    )


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(models, "STUDENT", models.Shape(maps=2, side=8, widths=(16, 16)))
    monkeypatch.setattr(models, "TEACHER", models.Shape(maps=2, side=8, widths=(16, 32)))
    with threadpool_limits(1):  # of torch and of scikit-learn: more would only wait for each other here
        yield


def network(method: str | None = None, epochs: int = 6, **fields) -> recipes.Network:
    recipe = dataclasses.replace(RECIPE, epochs=epochs)
    fields = {"alpha": 1.0, "beta": 1.0, **fields}
    if method:
        schedule, options = recipes.plan(method, 0.6, epochs)
        fields |= {"method": method, "densities": (0.4,), "schedule": schedule, "options": options}
    return recipes.Network(method or "SAD", method or "sad", recipe, **fields)


def trained(task, net, folder, teacher=None, seed=0):
    torch.manual_seed(seed)
    model = models.student(task)
    return model, loop.fit(model, task, net, teacher=teacher, seed=seed, folder=folder)


@pytest.fixture
def untimed(monkeypatch):
    """Leave out freezing and timing, which take most of a small run."""

    def as_it_is(model, *args):
        model.plan = SimpleNamespace(to_dict=dict)
        return {1: model}

    monkeypatch.setattr(train, "freeze_for", as_it_is)
    monkeypatch.setattr(train, "speed", lambda *args: ({"latency_ms_dense": None, "latency_ms_frozen": None}, ""))


@pytest.fixture
def teacher(task):
    torch.manual_seed(7)
    return models.teacher(task).eval()


def same(left, right) -> bool:
    ours, theirs = left.state_dict(), right.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


TIMINGS = ("seconds", "step_ms", "joules")


def without_timings(epochs):
    return [{key: value for key, value in epoch.items() if key not in TIMINGS} for epoch in epochs]


def test_twenty_steps_lower_the_loss(task, tmp_path):
    _, epochs = trained(task, network(epochs=5, alpha=0.0, beta=0.0), tmp_path)  # 5 epochs of 4 steps
    assert epochs[-1]["task"] < 0.8 * epochs[0]["task"]
    assert epochs[-1]["val_mse"] < evaluate.errors(torch.full((128,), task.mean), task, task.val)[1]


@pytest.mark.parametrize("method", list(train.METHODS))
def test_methods_reach_the_density_in_time(task, teacher, tmp_path, method):
    net = network(method, epochs=9)
    model, epochs = trained(task, net, tmp_path, teacher)
    assert evaluate.kept_share(model) == pytest.approx(0.4, abs=0.02)
    last_prune = max(epoch["epoch"] for epoch in epochs if epoch["pruned"])
    assert last_prune <= 6
    assert [epoch["level"] == 0.4 for epoch in epochs] == [epoch["epoch"] > last_prune for epoch in epochs]
    densities = [epoch["density"] for epoch in epochs]
    assert densities == sorted(densities, reverse=True) and densities[0] == 1.0
    best = checkpoint.load(models.student(task), tmp_path / "model.safetensors")
    assert evaluate.kept_share(best) == evaluate.kept_share(model)
    stored = checkpoint.metadata(tmp_path / "model.safetensors")
    assert stored["epoch"] == loop.picked_epoch(epochs, 0.4, "best", "mse")["epoch"] > last_prune
    assert evaluate.errors(evaluate.predict(best, task.val), task, task.val)[1] == pytest.approx(stored["val_mse"])


class Kill(Exception):
    pass


def stop_in(monkeypatch, epoch, at):
    """Raise once, like a kill, in `epoch`: in the middle of it, or after it, before or after its state is written."""
    if at == "mid-epoch":
        batches = Rows.batches
        calls = []

        def interrupted(self, size, generator=None, *ranks):
            calls.append(generator)
            for number, batch in enumerate(batches(self, size, generator, *ranks)):
                if generator is not None and sum(c is not None for c in calls) == epoch and number == 2:
                    raise Kill
                yield batch

        monkeypatch.setattr(Rows, "batches", interrupted)
        return
    save = loop._save_state

    def last_one(path, parts, epochs, settings):
        if at == "before state" and len(epochs) == epoch:
            raise Kill
        save(path, parts, epochs, settings)
        if at == "after state" and len(epochs) == epoch:
            raise Kill

    monkeypatch.setattr(loop, "_save_state", last_one)


@pytest.mark.parametrize("at", ["mid-epoch", "before state", "after state"])
@pytest.mark.parametrize("method", [None, *train.METHODS])
def test_resume_is_bit_identical(task, teacher, tmp_path, monkeypatch, method, at):
    net = network(method)
    whole, epochs = trained(task, net, tmp_path / "whole", teacher)
    for stop_after in (2, 4):  # between prunes, and stopped twice
        with monkeypatch.context() as patch:
            stop_in(patch, 2 if at == "mid-epoch" else stop_after, at)
            with pytest.raises(Kill):
                trained(task, net, tmp_path / "stopped", teacher)
    torch.manual_seed(99)  # another process has another random state
    resumed, resumed_epochs = trained(task, net, tmp_path / "stopped", teacher)
    assert same(whole, resumed)
    assert without_timings(epochs) == without_timings(resumed_epochs)
    best = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "stopped")]
    assert best[0] == best[1]


def test_recalibrated_batch_norm_sees_what_evaluation_sees():
    x = 3 + 2 * torch.randn(512, 4, 5, 5)
    model = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.BatchNorm2d(4))
    rows = Rows((x,), torch.zeros(512), np.zeros((512, 1)))
    loop.recalibrate(model, rows, 64, torch.Generator().manual_seed(0))  # 8 batches: all rows
    assert model[1].running_mean == pytest.approx(x.mean((0, 2, 3)), rel=1e-4)
    assert model[1].running_var == pytest.approx(x.var((0, 2, 3)), rel=0.02)
    assert model[1].momentum == 0.1 and model.training and model[0].training


def test_same_seed_same_bits_other_seed_other_bits(task, teacher, tmp_path):
    nets = [trained(task, network("lth-sad"), tmp_path / str(i), teacher, seed)[0] for i, seed in enumerate((0, 0, 1))]
    assert same(nets[0], nets[1]) and not same(nets[0], nets[2])


def test_state_of_another_run_is_refused(task, tmp_path):
    torch.manual_seed(0)
    net = network(epochs=2, alpha=0.0, beta=0.0)
    loop.fit(models.student(task), task, net, folder=tmp_path, settings={"density": 0.4})
    with pytest.raises(ValueError, match=r"its density is 0\.4, now 0\.3; give another --out, or --fresh"):
        loop.fit(models.student(task), task, net, folder=tmp_path, settings={"density": 0.3})


def test_other_precision_or_device_is_refused_but_may_measure_again(task, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "load", lambda *args, **options: task)
    config = train.RunConfig("synthetic", methods=(), quick=True, out=str(tmp_path), bf16=True, measure=False)
    one_epoch = dataclasses.replace(config, stop_after=1e-6)
    with pytest.raises(train.OutOfTime):
        train.run(one_epoch, lambda line: None)
    float32 = dataclasses.replace(config, bf16=False)
    with pytest.raises(ValueError, match=r"state\.safetensors is of another run: its bf16 is True, now False"):
        train.run(float32, lambda line: None)
    train.run(config, lambda line: None)
    with pytest.raises(ValueError, match=r"rows\.json is of another run: its bf16 is True, now False"):
        train.run(float32, lambda line: None)
    again, _ = train.run(dataclasses.replace(float32, remeasure=True), lambda line: None)
    assert {row["settings"]["bf16"] for row in again["rows"]} == {True}
    assert again["protocol"]["precision"] == "training and validation in bf16 autocast; test in float32"

    for path in tmp_path.rglob("rows.json"):  # as they were before there was such a setting
        rows = json.loads(path.read_text())
        for key in ("device", "bf16", "ranks"):
            del rows[0]["settings"][key]
        path.write_text(json.dumps(rows))
    for call in (config, float32, dataclasses.replace(config, remeasure=True)):
        assert "bf16" not in train.run(call, lambda line: None)[0]["rows"][0]["settings"]


def test_divergence_is_said(task, tmp_path):
    broken = dataclasses.replace(task, train=dataclasses.replace(task.train, target=task.train.target * float("nan")))
    with pytest.raises(RuntimeError, match="diverged in epoch 1"):
        trained(broken, network(alpha=0.0, beta=0.0), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("epochs", [6, 7, 8, 9, 10, 12, 16, 20, 40, 60])
@pytest.mark.parametrize("method", list(train.METHODS))
def test_plans_reach_the_target_by_two_thirds(method, epochs):
    schedule, options = recipes.plan(method, 0.55, epochs)
    begin = options.get("initial_epochs", 0)
    assert schedule.removed_after(epochs - begin) == 0.55
    assert begin + schedule.prunes * schedule.every <= 0.67 * epochs


def test_run_measures_the_frozen_student(task, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "load", lambda *args, **options: task)
    config = train.RunConfig("synthetic", methods=("lth-sad",), quick=True, out=str(tmp_path / "out"))
    results, folder = train.run(config, lambda line: None)
    assert folder == tmp_path / "out"
    assert [row["name"] for row in results["rows"]] == ["teacher", "student", "SAD", "LTH-SAD"]
    metrics = results["rows"][3]["metrics"]
    assert metrics["weights_kept"] == pytest.approx(0.45, abs=0.03)
    assert metrics["frozen_difference"] <= 1e-3
    saved = checkpoint.load(models.student(task), folder / "seed0/lth-sad-0.45/model.safetensors")
    mse = float((evaluate.predict(saved, task.test).clamp(1, 10) - task.test.target).square().mean())
    assert metrics["mse"] == pytest.approx(mse, rel=1e-6)
    dense = results["rows"][2]["metrics"]
    assert metrics["file_bytes"] < dense["file_bytes"] and metrics["parameters"] < dense["parameters"]
    for name in ("latency_ms_{}", "throughput_{}_64"):
        assert metrics[name.format("dense")] > 0 and metrics[name.format("frozen")] > 0
    assert {"constant", "ridge", "gradient boosting"} <= {score["name"] for score in results["baselines"]}
    assert not list(folder.rglob("state.safetensors"))


def test_run_goes_on_adds_seeds_and_starts_afresh(task, tmp_path, monkeypatch, untimed):
    monkeypatch.setattr(data, "load", lambda *args, **options: task)
    config = train.RunConfig("synthetic", methods=("lth-sad",), quick=True, out=str(tmp_path))
    said = []
    first, _ = train.run(config, said.append)
    assert sum("LTH-SAD @ 0.45" in line for line in said) == 1
    two, _ = train.run(dataclasses.replace(config, seeds=2), said.append)
    assert [row["seed"] for row in two["rows"]] == [0] * 4 + [1] * 4
    assert two["rows"][:4] == first["rows"]
    with monkeypatch.context() as patch:  # finished networks are not trained again
        patch.setattr(train, "fit", None)
        again, _ = train.run(dataclasses.replace(config, seeds=2), said.append)
        patch.setattr(train, "speed", lambda *args: ({"latency_ms_dense": 2.0, "latency_ms_frozen": 1.0}, "a counter"))
        timed, _ = train.run(dataclasses.replace(config, seeds=2, remeasure=True), said.append)
    assert again["rows"] == two["rows"]
    for before, after in zip(two["rows"], timed["rows"], strict=True):
        assert after["metrics"] == {**before["metrics"], "latency_ms_dense": 2.0, "latency_ms_frozen": 1.0}
        assert after["epochs"] == before["epochs"] and after["energy_note"] == "a counter"
    fresh, _ = train.run(dataclasses.replace(config, fresh=True), said.append)
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
    monkeypatch.setattr(data, "load", lambda *args, **options: task)
    monkeypatch.setattr(train, "freeze_for", lambda model, *args: {1: Nearly(model)})
    config = train.RunConfig("synthetic", methods=(), quick=True, out=str(tmp_path), bf16=True, measure=False)

    def check(results):
        for row in results["rows"]:
            saved = (models.teacher if row["name"] == "teacher" else models.student)(task)
            checkpoint.load(saved, tmp_path / f"seed0/{row['settings']['folder']}/model.safetensors")
            mae, mse = evaluate.errors(evaluate.predict(saved, task.test), task, task.test)
            assert (row["metrics"]["mae"], row["metrics"]["mse"]) == (mae, mse)
        return results

    untouched = check(train.run(config, lambda line: None)[0])
    assert "latency_ms_dense" not in untouched["rows"][0]["metrics"]
    monkeypatch.setattr(train, "fit", None)  # nothing is trained again
    measured = check(train.run(dataclasses.replace(config, measure=True, remeasure=True), lambda line: None)[0])
    assert measured["rows"][0]["metrics"]["frozen_difference"] == pytest.approx(5e-4, rel=0.01)

    path = tmp_path / "seed0/sad/rows.json"
    path.write_text(json.dumps([{**row, "metrics": {**row["metrics"], "mse": 0.0}} for row in measured["rows"][-1:]]))
    monkeypatch.setattr(train, "freeze_for", None)  # nor timed
    again = check(train.run(dataclasses.replace(config, remeasure=True), lambda line: None)[0])
    assert again["rows"] == measured["rows"]


def test_fewer_methods_keep_the_rows_of_the_others(task, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "load", lambda *args, **options: task)
    config = train.RunConfig("synthetic", methods=("kd", "at"), quick=True, out=str(tmp_path), measure=False)
    both, _ = train.run(config, lambda line: None)
    shutil.copytree(tmp_path / "seed0/at", tmp_path / "seed0/foreign")
    path = tmp_path / "seed0/foreign/rows.json"
    path.write_text(path.read_text().replace('"train_rows": 256', '"train_rows": 100').replace('"at"', '"foreign"'))
    for name in ("kd", "at"):
        one, _ = train.run(dataclasses.replace(config, methods=(name,)), lambda line: None)
        assert sorted(map(json.dumps, one["rows"])) == sorted(map(json.dumps, both["rows"]))
    assert one["protocol"]["students"]["kd"] == "of another call, see its settings in results.json"
    assert one["protocol"]["students"]["at"] == both["protocol"]["students"]["at"]


def test_ctrl_c_keeps_what_is_finished(task, tmp_path, monkeypatch, untimed):
    monkeypatch.setattr(data, "load", lambda *args, **options: task)
    config = train.RunConfig("synthetic", methods=("sp-sad",), quick=True, out=str(tmp_path))
    save = loop._save_state

    def pressed(path, parts, epochs, settings):
        save(path, parts, epochs, settings)
        if "sp-sad" in str(path) and len(epochs) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_save_state", pressed)
        with pytest.raises(KeyboardInterrupt):
            train.run(config, lambda line: None)
    assert (tmp_path / "seed0/sad/rows.json").is_file()
    state = checkpoint.load_state(tmp_path / "seed0/sp-sad-0.45/state.safetensors")
    assert len(state["epochs"]) == 2
    stopped, _ = train.run(config, lambda line: None)
    whole, _ = train.run(dataclasses.replace(config, out=str(tmp_path / "whole")), lambda line: None)
    for left, right in zip(stopped["rows"], whole["rows"], strict=True):
        assert without_timings(left["epochs"]) == without_timings(right["epochs"])
        assert left["metrics"]["mse"] == right["metrics"]["mse"]


def test_fresh_leaves_other_files(tmp_path):
    (tmp_path / "seed0").mkdir()
    (tmp_path / "seedlings.txt").write_text("mine")
    (tmp_path / "results.json").write_text(json.dumps({}))
    train._clear(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["seedlings.txt"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"densities": (0.0,)}, "density"),
        ({"densities": (1.5,)}, "density"),
        ({"methods": ("sp",)}, "method must be one of sp-sad, lth-sad, ss-sad, .*, got 'sp'"),
        ({"seeds": 0}, "seeds must be at least 1"),
        ({"threads": 0}, "threads must be at least 1"),
    ],
)
def test_bad_configurations(fields, message):
    with pytest.raises(ValueError, match=message):
        train.RunConfig(**fields)


def test_predictions_are_clipped(task):
    far = torch.full((128,), 99.0)
    at_the_end = torch.full((128,), 10.0)
    assert evaluate.errors(far, task, task.test) == evaluate.errors(at_the_end, task, task.test)


def test_kept_share_leaves_out_what_is_not_pruned(task):
    model = models.student(task)
    assert evaluate.kept_share(model) == 1.0
    assert evaluate.count_parameters(model) == sum(p.numel() for p in model.parameters())
    assert isinstance(part(4, 0).features, np.ndarray)
