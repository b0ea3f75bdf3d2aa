"""The loop over epochs learns, prunes to the target, and goes on after a kill as if nothing had happened."""

import dataclasses
import math
import time

import numpy as np
import pytest
import torch

from sparsekd import checkpoint
from sparsekd.data import Rows
from sparsekd.methods import METHODS, Method
from sparsekd.runs import epochs, evaluate
from sparsekd.runs.plans.network import Counting
from sparsekd.runs.state import StateFile
from sparsekd.runs.steps import Stepper

from .made_up import errors, network, same, student_of, trained, without_timings


def test_twenty_steps_lower_the_loss(task, tmp_path):
    _, history = trained(task, network(epochs=5, alpha=0.0, beta=0.0), tmp_path)  # 5 epochs of 4 steps
    assert history[-1]["task"] < 0.8 * history[0]["task"]
    assert history[-1]["val_mse"] < errors(torch.full((128,), task.mean), task, task.val)["mse"]


@pytest.mark.parametrize("method", list(METHODS))
def test_methods_reach_the_density_in_time(task, teacher, tmp_path, method):
    net = network(method, epochs=9).counting(Counting("weights"))  # which `kept_share` and "density" count
    model, history = trained(task, net, tmp_path, teacher)
    assert evaluate.kept_share(model) == pytest.approx(0.4, abs=0.02)
    last_prune = max(epoch["epoch"] for epoch in history if epoch["pruned"])
    assert last_prune <= 6
    assert [epoch["level"] == 0.4 for epoch in history] == [epoch["epoch"] > last_prune for epoch in history]
    densities = [epoch["density"] for epoch in history]
    assert densities == sorted(densities, reverse=True) and densities[0] == 1.0
    best = checkpoint.load(student_of(task), tmp_path / "model.safetensors")
    assert evaluate.kept_share(best) == evaluate.kept_share(model)
    stored = checkpoint.metadata(tmp_path / "model.safetensors")
    assert stored["epoch"] == epochs.picked_epoch(history, 0.4, "best", task.goal.judge)["epoch"] > last_prune
    assert errors(best, task, task.val)["mse"] == pytest.approx(stored["val_mse"])


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
    save = StateFile.save

    def last_one(self, history):
        if at == "before state" and len(history) == epoch:
            raise Kill
        save(self, history)
        if at == "after state" and len(history) == epoch:
            raise Kill

    monkeypatch.setattr(StateFile, "save", last_one)


@pytest.mark.parametrize("at", ["mid-epoch", "before state", "after state"])
@pytest.mark.parametrize("method", [None, *METHODS])
def test_resume_is_bit_identical(task, teacher, tmp_path, monkeypatch, method, at):
    net = network(method)
    whole, history = trained(task, net, tmp_path / "whole", teacher)
    for stop_after in (2, 4):  # between prunes, and stopped twice
        with monkeypatch.context() as patch:
            stop_in(patch, 2 if at == "mid-epoch" else stop_after, at)
            with pytest.raises(Kill):
                trained(task, net, tmp_path / "stopped", teacher)
    torch.manual_seed(99)  # another process has another random state
    resumed, resumed_history = trained(task, net, tmp_path / "stopped", teacher)
    assert same(whole, resumed)
    assert without_timings(history) == without_timings(resumed_history)
    best = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "stopped")]
    assert best[0] == best[1]


def split(epochs, splits=2, **fields):
    net = network(epochs=epochs, **fields)
    return dataclasses.replace(net, recipe=dataclasses.replace(net.recipe, splits=splits))


def test_the_epochs_of_a_pass_see_each_row_once_at_one_falling_rate(task, tmp_path, monkeypatch):
    seen, rates = [], []

    def watched(self, batches, rate_at):
        taken = [target for _, target in batches]
        seen.append(torch.cat(taken))
        rates.extend(rate_at(step).lr for step in range(len(taken)))
        return dict.fromkeys(("loss", "task", "kd", "sad"), 0.0)

    monkeypatch.setattr(Stepper, "learn", watched)
    net = split(4, alpha=0.0, beta=0.0)  # two passes of four steps
    trained(task, net, tmp_path / "two")
    assert [len(rows) for rows in seen] == [128] * 4
    for one in (seen[:2], seen[2:]):
        assert torch.equal(torch.cat(one).sort().values, task.train.target.sort().values)
    assert not torch.equal(torch.cat(seen[:2]), torch.cat(seen[2:]))
    assert rates == pytest.approx([net.recipe.lr * 0.5 * (1 + math.cos(math.pi * step / 8)) for step in range(8)])
    seen.clear()
    few = dataclasses.replace(task, train=task.train.take(slice(0, 40)))  # one batch: nothing to split
    trained(few, split(2, alpha=0.0, beta=0.0), tmp_path / "few")
    assert [len(rows) for rows in seen] == [40, 40]


def test_a_run_goes_on_in_the_middle_of_a_pass(task, teacher, tmp_path, monkeypatch):
    whole, history = trained(task, split(4), tmp_path / "whole", teacher)
    with monkeypatch.context() as patch:
        stop_in(patch, 3, "after state")
        with pytest.raises(Kill):
            trained(task, split(4), tmp_path / "stopped", teacher)
    resumed, resumed_history = trained(task, split(4), tmp_path / "stopped", teacher)
    assert same(whole, resumed) and without_timings(history) == without_timings(resumed_history)


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_recalibrated_batch_norm_sees_what_evaluation_sees(dimensions):
    norm = {1: torch.nn.BatchNorm1d, 2: torch.nn.BatchNorm2d, 3: torch.nn.BatchNorm3d}[dimensions]
    shape = {1: (4,), 2: (4, 5, 5), 3: (4, 3, 3, 3)}[dimensions]
    x = 3 + 2 * torch.randn(4096 if dimensions == 1 else 512, *shape)
    model = torch.nn.Sequential(torch.nn.Dropout(0.5), norm(4))
    rows = Rows((x,), torch.zeros(len(x)), np.zeros((len(x), 1)))
    epochs.recalibrate(model, rows, len(x) // 8, torch.Generator().manual_seed(0))  # 8 batches: all rows
    every_other = [axis for axis in range(x.dim()) if axis != 1]
    assert model[1].running_mean == pytest.approx(x.mean(every_other), rel=1e-4)
    assert model[1].running_var == pytest.approx(x.var(every_other), rel=0.02)
    assert model[1].momentum == 0.1 and model.training and model[0].training


def test_same_seed_same_bits_other_seed_other_bits(task, teacher, tmp_path):
    nets = [trained(task, network("lth-sad"), tmp_path / str(i), teacher, seed)[0] for i, seed in enumerate((0, 0, 1))]
    assert same(nets[0], nets[1]) and not same(nets[0], nets[2])


def test_state_of_another_run_is_refused(task, tmp_path):
    torch.manual_seed(0)
    net = network(epochs=2, alpha=0.0, beta=0.0)
    epochs.fit(student_of(task), task, net, folder=tmp_path, settings={"density": 0.4})
    with pytest.raises(ValueError, match=r"its density is 0\.4, now 0\.3; give another --out, or --fresh"):
        epochs.fit(student_of(task), task, net, folder=tmp_path, settings={"density": 0.3})


def test_divergence_is_said(task, tmp_path):
    broken = dataclasses.replace(task, train=dataclasses.replace(task.train, target=task.train.target * float("nan")))
    with pytest.raises(RuntimeError, match="diverged in epoch 1"):
        trained(broken, network(alpha=0.0, beta=0.0), tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_first_epoch_holds_the_prune_before_it(task, tmp_path, monkeypatch):
    """Its seconds do; the time of a step does not."""
    before = Method.before_training

    def slowly(self, batches):
        time.sleep(1.0)
        before(self, batches)
        return "an event"

    monkeypatch.setattr(Method, "before_training", slowly)
    _, (first, second) = trained(task, network(epochs=2, alpha=0.0, beta=0.0), tmp_path)
    assert first["pruned_before"] is True and "pruned_before" not in second
    steps = task.train.steps(64)
    assert first["seconds"] > 1.0 and first["step_ms"] * steps == pytest.approx(1e3 * (first["seconds"] - 1), abs=100)
