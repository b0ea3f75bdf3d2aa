"""Plans of image tasks: our recipe and the paper's, sweeps over densities, networks that learn as they say."""

import dataclasses
import functools
from typing import ClassVar

import pytest
import torch

from sparsekd import checkpoint, data, models, report, runs
from sparsekd.methods import METHODS, PAPER
from sparsekd.runs import RunConfig, epochs, tasks
from sparsekd.runs.learners import learner_of
from sparsekd.runs.plans import images
from sparsekd.runs.plans.network import KNOWN_METHODS
from sparsekd.runs.rates import learning_rate
from sparsekd.runs.steps import Stepper

from . import made_up_images
from .made_up_images import Tiny, config


@pytest.fixture(scope="module")
def task(folder):
    with pytest.MonkeyPatch.context() as patch:
        made_up_images.few(patch)
        return data.load("cifar100", folder, validation=100)


def planned(task, densities, quick=False, methods=KNOWN_METHODS, **options):
    """The networks of a run, by their folders."""
    asked = RunConfig("cifar100", densities=densities, methods=methods, quick=quick, options=options)
    return {network.folder: network for network in tasks.plan_of(task, tasks.complete(asked)).networks}


def test_paper_recipes_are_those_of_its_table(task):
    densities = (0.7, 0.5, 0.4, 0.3)
    found = planned(task, densities, recipe="paper")
    for method, column in PAPER.items():
        recipe = found[method].recipe
        assert (recipe.epochs, recipe.lr, recipe.weight_decay, recipe.milestones, recipe.batch_size) == (
            column.epochs,
            column.learning_rate,
            column.weight_decay,
            column.milestones,
            64,
        )
        assert (found[method].alpha, found[method].beta, found[method].schedule) == (
            column.alpha,
            column.beta,
            column.schedule,
        )
    assert found["sp-sad"].densities == (0.7, 0.5, 0.4, 0.3)
    with pytest.raises(ValueError, match=r"prunes sp-sad to the densities 0.3, 0.4, .*, got 0.2; choose among these"):
        planned(task, (0.2,), recipe="paper")  # beyond its schedule
    ticket = found["ss-sad"].ticket
    assert (ticket.lr, ticket.weight_decay, ticket.milestones) == (0.05, 5e-4, ())
    assert {network.pattern for network in found.values()} == {"16x1"}
    assert found["sad"].recipe.milestones == (150, 180, 210) and found["sad"].beta == 200
    assert (found["magnitude"].alpha, found["magnitude"].beta) == (0, 0)
    assert {name: found[name].options["scope"] for name in METHODS} == {
        "sp-sad": "layer",
        "lth-sad": "global",
        "ss-sad": "global",
    }
    assert {found[name].schedule.unit for name in METHODS} == {"weights"}
    assert found["random"].options == {"score": "random", "scope": "layer"} and found["at"].features == "at"
    reduced = planned(task, densities, recipe="paper", protocol="reduced")
    for network in reduced.values():
        assert network.recipe.epochs < found[network.folder].recipe.epochs / 9
        if network.schedule:
            network.schedule.check_reaches(network.recipe.epochs)
            assert network.densities == found[network.folder].densities


def test_our_reduced_recipe_is_that_of_its_protocol(task):
    protocol = images.PROTOCOLS["reduced"]
    found = planned(task, (0.7, 0.2), protocol="reduced")
    assert found["teacher"].recipe.epochs == protocol.teacher_epochs
    assert {found[name].recipe.epochs for name in ("student", "kd", "at", "sad")} == {6 * protocol.round_epochs}
    assert (found["at"].beta, found["at"].features) == (protocol.at_beta, "at")
    pruned = [f"{name}-{density}" for name in ("random", *METHODS) for density in (0.7, 0.2)]
    assert {found[name].beta for name in ("sad", *pruned)} == {protocol.beta}
    quick = planned(task, (0.7, 0.2), quick=True, protocol="reduced")
    assert quick["teacher"].recipe.epochs == quick["student"].recipe.epochs == 6


@pytest.mark.parametrize("quick", [False, True])
def test_every_student_of_the_reduced_protocol_sees_as_many_images(task, quick):
    asked = RunConfig("cifar100", densities=(0.5, 0.2), methods=KNOWN_METHODS, quick=quick)
    asked = tasks.complete(dataclasses.replace(asked, options={"protocol": "reduced"}))
    plan = tasks.plan_of(task, asked)
    lengths = {network.recipe.epochs for network in plan.students}
    assert lengths == {6 if quick else 12} == {plan.views}  # a view for every epoch
    pruned = [network for network in plan.students if network.method]
    assert {network.densities for network in pruned} == {(0.5,), (0.2,)} and len(pruned) == 10
    for network in pruned:
        (density,) = network.densities
        method = learner_of(Tiny(), task, dataclasses.replace(network, alpha=0.0, beta=0.0), None, 0)
        last, removed = method.prunes()[-1]
        assert removed == pytest.approx(1 - density)
        assert last <= network.recipe.epochs / 3  # two thirds of the images are seen by what is left
    full = tasks.plan_of(task, tasks.complete(RunConfig("cifar100", densities=(0.5, 0.2), quick=quick)))
    assert full.views == 0 and {network.densities for network in full.students if network.method} == {(0.5, 0.2)}


@pytest.mark.parametrize("recipe", ["ours", "paper"])
def test_the_number_of_views_can_be_chosen(task, recipe):
    for given, views in (("3", 3), ("0", 0)):
        options = {"protocol": "reduced", "recipe": recipe, "views": given}
        assert tasks.plan_of(task, tasks.complete(RunConfig("cifar100", options=options))).views == views
    with pytest.raises(ValueError, match="views must be a whole number of 0 or more, got '-1'"):
        tasks.complete(RunConfig("cifar100", options={"views": "-1"}))


def test_the_ticket_of_the_paper_learns_at_its_own_rate(task, monkeypatch, tmp_path):
    rates = []

    def watched(self, batches, rate_at):
        rates.append(rate_at(0))
        return dict.fromkeys(("loss", "task", "kd", "sad"), 0.0)

    monkeypatch.setattr(Stepper, "learn", watched)
    network = planned(task, (0.5,), quick=True, methods=("ss-sad",), recipe="paper")["ss-sad"]
    epochs.fit(Tiny(), task, dataclasses.replace(network, alpha=0.0, beta=0.0), folder=tmp_path)
    ticket = len([rate for rate in rates if rate.lr == 0.05])
    assert 0 < ticket < len(rates)
    assert [rate.lr for rate in rates] == [0.05] * ticket + [5e-4] * (len(rates) - ticket)
    assert [rate.weight_decay for rate in rates] == [5e-4] * ticket + [0.0] * (len(rates) - ticket)


@pytest.mark.parametrize("method", list(METHODS))
def test_sweeps_pass_every_density(task, method):
    targets = (0.3, 0.5, 0.6, 0.7, 0.8)
    for length in (1, 2, 40):
        schedule, options, epochs = images.sweep(method, targets, length)
        schedule.check_reaches(epochs - options.get("initial_epochs", 0))
        assert schedule.targets == targets and options.get("rewind_to", 0) < schedule.every


def test_learning_rates():
    recipe = dataclasses.replace(images.PLAIN, lr=1.0, milestones=(2, 4))
    assert [learning_rate(recipe, e, 0.0, (1, 6)) for e in range(1, 7)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    cosine = dataclasses.replace(recipe, milestones=None)
    assert learning_rate(cosine, 3, 0.0, (3, 4)) == 1.0
    assert learning_rate(cosine, 4, 0.0, (3, 4)) == pytest.approx(0.5)


def test_a_sweep_makes_a_row_of_every_density(folder, tmp_path, tiny):
    results, out = runs.run(config(folder, tmp_path), lambda line: None)
    names = [row["name"] for row in results["rows"]]
    assert names[:5] == ["teacher", "student", "KD", "AT", "SAD"] and len(names) == 5 + 2 * 5
    for row in results["rows"][5:]:
        metrics = row["metrics"]
        assert metrics["macs_kept"] == pytest.approx(row["target_density"], abs=0.02)
        assert 0 <= metrics["accuracy"] <= 1 and "latency_ratio" not in metrics
        (kept,) = {tuple(one["shape"]) for name, one in row["blocks"].items() if name == "block.conv2"}
        assert kept == (2, 32, 3, 3)
    first, second = (row for row in results["rows"] if row["name"] == "LTH-SAD")
    epochs = first["epochs"]
    assert [e["level"] for e in epochs] == [1.0, 1.0, 0.6, 0.6, 0.3, 0.3] and second["epochs"] == []
    assert [e["rewound"] for e in epochs] == [False, True, False, True, False, False]
    assert first["best_epoch"] == 4 and second["best_epoch"] == 6
    saved = checkpoint.metadata(out / "seed0/lth-sad/model-0.6.safetensors")
    assert saved["epoch"] == 4 and saved["val_accuracy"] == epochs[3]["val_accuracy"]
    chosen = [e["target_density"] for e in results["summary"] if e["name"] == "LTH-SAD" and e["selected"]]
    best = max((first, second), key=lambda row: row["metrics"]["val_accuracy"])
    assert chosen == [best["target_density"]]
    assert "LTH-SAD @ macs=0.6" in report.result_tables(results)


def test_stops_in_time_and_goes_on_with_the_same_bits(folder, tmp_path, tiny):
    methods = ("lth-sad", "ss-sad")
    whole, _ = runs.run(config(folder, tmp_path / "whole", methods=methods), lambda line: None)
    stops = 0
    while True:
        try:  # an epoch a call
            short, _ = runs.run(config(folder, tmp_path / "short", methods=methods, stop_after=1e-6), lambda line: None)
            break
        except runs.OutOfTime:
            stops += 1
    assert stops > 10
    for left, right in zip(whole["rows"], short["rows"], strict=True):
        for timing in ("train_seconds", "train_joules", "step_ms_first", "step_ms_last"):
            left["metrics"].pop(timing), right["metrics"].pop(timing)
        assert left["metrics"] == right["metrics"] and left["blocks"] == right["blocks"]


class Watched(Tiny):
    """Notes in which mode and type it computes."""

    seen: ClassVar = set()

    def forward(self, x):
        logits = super().forward(x)
        self.seen.add((self.training and torch.is_grad_enabled(), logits.dtype))
        return logits


@pytest.mark.parametrize("bf16", [False, True])
def test_precision_is_bf16_where_asked(folder, tmp_path, tiny, monkeypatch, bf16):
    monkeypatch.setattr(Watched, "seen", set())
    monkeypatch.setitem(models.CLASSIFIERS, "wrn-16-2", lambda classes: Watched())
    results, _ = runs.run(config(folder, tmp_path, methods=(), bf16=bf16), lambda line: None)
    trained = torch.bfloat16 if bf16 else torch.float32
    assert {dtype for training, dtype in Watched.seen if training} == {trained}
    assert {dtype for training, dtype in Watched.seen if not training} == {trained, torch.float32}  # test: float32
    precision = "bf16 autocast" if bf16 else "float32"
    assert results["protocol"]["precision"] == f"training and validation in {precision}; test in float32"


def test_compiled_steps_learn_the_same(folder, tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))  # no C++ compiler
    settings = tasks.complete(config(folder, tmp_path, methods=("sp-sad",)))
    task = tasks.entry_of("cifar100").load(settings)
    plan = tasks.plan_of(task, settings)
    network = plan.students[-1]
    histories = []
    for compiled in (False, True):
        torch.manual_seed(0)
        teacher, student = plan.teacher.make(), network.make()
        options = {"teacher": teacher, "folder": tmp_path / str(compiled), "runtime": runs.Runtime(compiled=compiled)}
        histories.append(epochs.fit(student, task, network, **options))
    assert [epoch["pruned"] for epoch in histories[1]] == [True, True, False]
    for key in ("loss", "task", "kd", "sad"):
        assert [e[key] for e in histories[1]] == pytest.approx([e[key] for e in histories[0]], rel=1e-3)


@pytest.mark.parametrize("score", ["magnitude", "snip"])
def test_methods_of_images_prune_before_the_first_step(tiny, folder, tmp_path, score):
    """At one density, though LTH-SAD goes back to a later epoch where it prunes while it trains. A saliency judges what
    a teacher takes part in from the first step."""
    asked = config(folder, tmp_path, densities=(0.3,), methods=(*METHODS, "random", "magnitude"), at_once=score)
    asked = tasks.complete(asked)
    task = images.load("cifar100", asked)
    pruned = [network for network in tasks.plan_of(task, asked).students if network.schedule]
    by = {"magnitude": ("", " by lamp"), "snip": (" by snip", " by snip")}[score]
    names = [f"SP-SAD at once{by[0]}", f"LTH-SAD at once{by[1]}", "SS-SAD at once by lamp"]
    assert [network.name for network in pruned] == [*names, "random blocks, SAD at once", "SP, no teacher at once"]
    teacher = Tiny(32).eval()
    for network in pruned:
        assert network.options.get("first_score") == ("snip" if "snip" in network.name else None)
        method = learner_of(network.make(), task, network, teacher, 0)
        method.attach(Stepper(method, "nesterov", runs.Runtime()).optimizer)
        event = method.before_training([next(iter(task.train.batches(16)))])
        assert event.boundary == 0 and event.target == pytest.approx(0.466667 if "SS" in network.name else 0.7)
    with pytest.raises(ValueError, match="SP-SAD trains one student along 2 densities"):
        runs.run(config(folder, tmp_path / "out", at_once=score), lambda line: None)
    assert not (tmp_path / "out").exists()
