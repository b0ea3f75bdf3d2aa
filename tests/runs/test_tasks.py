"""A task is an entry: its reader, its plan, and the options that no other task has."""

import dataclasses
import math
from pathlib import Path

import pytest

from sparsekd import runs
from sparsekd.runs import Option, RunConfig, tasks

from . import made_up


def test_defaults_are_those_of_the_task():
    assert tasks.complete(RunConfig()).densities == (0.45,)
    assert tasks.complete(RunConfig("movies")).densities == (0.45, 0.3, 0.2, 0.1, 0.05)
    assert tasks.complete(RunConfig()).methods == ("sp-sad", "lth-sad", "ss-sad")
    images = tasks.complete(RunConfig("cifar100"))
    assert images.densities == (0.7, 0.5, 0.4, 0.3, 0.2) and {"kd", "at", "random", "magnitude"} < set(images.methods)
    assert images.options == {"teacher": "wrn-40-2", "student": "wrn-16-2", "recipe": "ours", "protocol": "full"}
    assert tasks.complete(RunConfig("cifar100", options={"recipe": "paper"})).densities == (0.7, 0.5, 0.4, 0.3)
    assert tasks.complete(RunConfig("cifar100", densities=(0.1,), methods=("kd",))).densities == (0.1,)


@pytest.mark.parametrize(
    ("fields", "unit", "scope"),
    [
        ({}, "macs", "cost"),
        ({"options": {"recipe": "paper"}}, "weights", None),
        ({"unit": "weights"}, "weights", None),
        ({"unit": "bytes"}, "bytes", "cost"),
        ({"unit": "weights", "scope": "cost"}, "weights", "cost"),
        ({"scope": "layer"}, "macs", "layer"),
    ],
)
def test_a_run_counts_work_unless_it_is_asked_for_weights(fields, unit, scope):
    complete = tasks.complete(RunConfig("movietweetings", **fields))
    assert (complete.unit, complete.scope) == (unit, scope)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (RunConfig("netflix"), "name must be one of movietweetings, .*, got 'netflix'"),
        (RunConfig("movies", options={"colour": "red"}), "movies has no option 'colour'; its options: group, recipe"),
        (RunConfig("movielens", options={"colour": "red"}), "movielens has no option 'colour'; its options: recipe"),
        (RunConfig("movies", options={"group": "red"}), "group must be one of numerical, .*, all, got 'red'"),
        (RunConfig("movies", options={"protocol": "full"}), "--protocol full belongs to the task cifar100, got movies"),
        (RunConfig("movies", options={"batch_size": "8"}), "--batch-size 8 belongs to the task sparserec, got movies"),
        (RunConfig("sparserec", options={"lr": "fast"}), "lr must be a number of 0 or more, got 'fast'"),
        (
            RunConfig("sparserec", options={"weight_decay": "nan"}),
            "weight_decay must be a number of 0 or more, .*'nan'",
        ),
        (RunConfig("sparserec", options={"lr": "inf"}), "lr must be a number of 0 or more, got 'inf'"),
        (RunConfig("sparserec", options={"epochs": "0"}), "epochs must be a whole number of 1 or more, got '0'"),
        (RunConfig("sparserec", options={"batch_size": "2.5"}), "batch_size must be a whole number of 2 or more"),
        (RunConfig("sparserec", options={"epochs": 2.5}), "epochs must be a whole number of 1 or more, got 2.5"),
        (
            RunConfig("sparserec", options={"batch_size": math.inf}),
            "batch_size must be a whole number of 2 or more, got inf",
        ),
    ],
)
def test_options_of_other_tasks_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        tasks.complete(config)


def test_groups_of_movies_are_runs_of_their_own(tmp_path):
    several = runs.several(RunConfig("movies", out=str(tmp_path)))
    assert [one.options["group"] for one in several] == ["numerical", "social", "textual", "categorical"]
    assert len({one.out for one in several}) == 4
    (one,) = runs.several(RunConfig("movies", out=str(tmp_path), options={"group": "social"}))
    assert one.out == str(tmp_path) and one.options == {"group": "social", "recipe": "ours"}
    with pytest.raises(ValueError, match=r"movies with the options .*all.* means 4 runs; .*runs\.several"):
        runs.run(RunConfig("movies", out=str(tmp_path)))


def test_the_folder_names_what_differs(task):
    images = {"recipe": "paper", "protocol": "reduced", "student": "resnet-18"}
    for config, folder in (
        (RunConfig("synthetic"), "runs/synthetic"),
        (RunConfig("synthetic", quick=True), "runs/synthetic-quick"),
        (RunConfig("cifar100", options=images, quick=True), "runs/synthetic-paper-reduced-quick"),
        (RunConfig("cifar100", options={"recipe": "ours"}), "runs/synthetic"),
        (RunConfig("cifar100", out="elsewhere"), "elsewhere"),
        (RunConfig("synthetic", unit="weights"), "runs/synthetic-weights"),
        (RunConfig("synthetic", unit="bytes", scope="layer"), "runs/synthetic-bytes-layer"),
        (RunConfig("movielens", options={"recipe": "paper"}), "runs/synthetic-paper"),
    ):
        assert tasks.folder_of(tasks.complete(config), task) == Path(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task": "cifar100"}, "SP-SAD trains one student along 5 densities, .*; leave --at-once out"),
        (
            {"task": "cifar100", "options": {"recipe": "paper"}},
            "the published recipe prunes while it trains, got at_once",
        ),
        ({"task": "synthetic", "methods": ()}, "no student of this task is pruned by a schedule; leave --at-once out"),
    ],
)
def test_what_cannot_be_pruned_at_once_is_refused(task, fields, message):
    images = dataclasses.replace(task, sizes={"classes": 20, "pixels": 8})
    with pytest.raises(ValueError, match=message):
        tasks.plan_of(images, tasks.complete(RunConfig(at_once="magnitude", **fields)))


def test_a_new_task_is_one_entry(task, tmp_path, monkeypatch, untimed):
    """Nothing but the registry knows it: its option reaches the reader, its methods and densities are run."""
    seen = []

    def load(config):
        seen.append(config.options["colour"])
        return task

    own = Option("colour", "red", ("red", "blue"), "of the made-up films", in_folder=True)
    entry = runs.Entry(load=load, plan=made_up.plan, options=(own,), methods=("sp-sad",), densities=lambda _: (0.5,))
    monkeypatch.setitem(runs.TASKS, "colours", entry)
    monkeypatch.chdir(tmp_path)
    config = RunConfig("colours", options={"colour": "blue"}, quick=True)
    results, folder = runs.run(config, lambda line: None)
    assert seen == ["blue"] and folder == Path("runs/synthetic-blue-quick")
    assert [row["name"] for row in results["rows"]] == ["teacher", "student", "SAD", "SP-SAD"]
    assert results["rows"][-1]["target_density"] == 0.5
    assert dataclasses.replace(config, options={}).options == {}
