"""A teacher that is run once teaches what one teaches that is run in every step."""

import dataclasses
import importlib

import pytest
import torch

from sparsekd import models, runs
from sparsekd.data import Rows
from sparsekd.data.cifar100 import Images
from sparsekd.methods import METHODS
from sparsekd.runs import RunConfig, epochs, teaching
from sparsekd.runs.runtime import Runtime

from .made_up import network, student_of

run_module = importlib.import_module("sparsekd.runs.run")  # `runs.run` is the function in it
MOST = 1e-4  # relative: rounding of a few dozen steps


def kept(teacher, task, heard=None):
    return teaching.kept_teacher(teacher, task, Runtime(), (heard if heard is not None else []).append)


@pytest.mark.parametrize("net", [None, "lth-sad", "ss-sad", "at", "kd"])
def test_a_student_learns_the_same_from_what_was_kept(task, teacher, tmp_path, monkeypatch, net):
    fields = {"at": {"features": "at"}, "kd": {"beta": 0.0}}.get(net, {})
    described = network(net if net in METHODS else None, **fields)
    cache = kept(teacher, task)
    histories = []
    for of_steps in (None, cache):
        torch.manual_seed(0)
        if of_steps is not None:
            monkeypatch.setattr(type(teacher), "forward", refusing(type(teacher).forward, teacher))
        folder = tmp_path / str(of_steps is None)
        histories.append(
            epochs.fit(student_of(task), task, described, teacher=teacher, kept=of_steps, seed=0, folder=folder)
        )
    for run, told in zip(*histories, strict=True):
        for name in ("loss", "task", "kd", "sad", "val_mse", "density"):
            assert told[name] == pytest.approx(run[name], rel=MOST), name
    assert histories[0][-1]["kd"] > 0


def refusing(forward, teacher):
    """The teacher is run for two rows, by the distiller, which looks what there is to tap."""

    def checked(self, *inputs):
        assert self is not teacher or len(inputs[0]) == 2, "the teacher was not to run"
        return forward(self, *inputs)

    return checked


def test_a_run_asks_its_teacher_once_and_comes_to_the_same(task, tmp_path, untimed, monkeypatch):
    config = RunConfig("synthetic", methods=("sp-sad",), out=str(tmp_path / "kept"))
    heard, made = [], []
    fill = teaching.kept_teacher
    monkeypatch.setattr(run_module.baselines, "run", lambda loaded: [])
    monkeypatch.setattr(run_module, "kept_teacher", lambda *args: made.append(fill(*args)) or made[-1])
    results, _ = runs.run(config, heard.append)
    assert len(made) == 1 and made[0].rows == len(task.train)  # of two students that learn from it
    assert sum("has been run once on 256 rows" in line for line in heard) == 1
    runs.run(config, heard.append)
    assert len(made) == 1  # all of them had finished

    monkeypatch.setattr(teaching, "MOST_BYTES", 0)
    again, _ = runs.run(dataclasses.replace(config, out=str(tmp_path / "run")), heard.append)
    assert made[1:] == [None]
    assert sum("the teacher is run in every step: what it says of 256 rows" in line for line in heard) == 1
    assert len(again["rows"]) == 4
    for row, other in zip(results["rows"], again["rows"], strict=True):
        assert (row["name"], row["seed"]) == (other["name"], other["seed"])
        for name in ("mse", "mae", "val_mse", "weights_kept"):
            assert row["metrics"][name] == pytest.approx(other["metrics"][name], rel=MOST)


def test_what_is_augmented_or_drawn_anew_is_not_kept(task, teacher):
    augmented = dataclasses.replace(task.train, prepare=lambda inputs, generator: inputs)
    assert kept(teacher, dataclasses.replace(task, train=augmented)) is None
    pairs = type("Pairs", (), {})()
    assert kept(teacher, dataclasses.replace(task, train=pairs)) is None


def test_batches_are_told_what_belongs_to_their_rows(task, teacher):
    cache, part = kept(teacher, task), task.train
    assert isinstance(part, Rows)
    generator, plain = (torch.Generator().manual_seed(3) for _ in range(2))
    taught = teaching.taught_batches(part, cache, Runtime(), 64, generator, 0, 1)
    with torch.no_grad():
        for (inputs, target, told), (same_inputs, same_target) in zip(taught, part.batches(64, plain), strict=True):
            assert torch.equal(inputs[0], same_inputs[0]) and torch.equal(target, same_target)
            torch.testing.assert_close(told.output, teacher(*inputs))


def test_students_of_augmented_images_share_the_views_that_the_teacher_saw():
    pictures = torch.randint(0, 256, (70, 3, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    augmented = Images((0.5,) * 3, (0.25,) * 3, padding=1)
    part = Rows((pictures,), torch.arange(70) % 4, None, prepare=augmented)
    teacher = models.ResNet((1,), 4, (8,)).eval()
    images = dataclasses.make_dataclass("Images", ["train"])(part)
    heard = []
    cache = teaching.kept_teacher(teacher, images, Runtime(), heard.append, views=3, seed=5)
    assert cache.views == 3 and "has been run once on 70 rows in 3 views" in heard[0]

    def epoch(number, seed=5):
        shuffle = torch.Generator().manual_seed(number)
        return list(taught(part, cache, shuffle, seed=seed, epoch=number))

    for number in (1, 2, 3, 4):
        for inputs, target, told in epoch(number):
            torch.testing.assert_close(told.output, teacher(*inputs), rtol=1e-4, atol=1e-5)
            assert target.dtype == torch.int64
    by_sum = [{round(float(x.sum()), 2) for inputs, *_ in epoch(number) for x in inputs[0]} for number in (1, 2, 4)]
    assert by_sum[0] == by_sum[2] and len(by_sum[0] & by_sum[1]) < 35  # a crop of few is the same in two views
    inputs, _, told = epoch(1, seed=6)[0]  # the views of another seed
    assert (told.output - teacher(*inputs)).abs().max() > 1e-3

    assert teaching.kept_teacher(teacher, images, Runtime(), heard.append) is None  # the run of each step sees its own


def taught(part, cache, shuffle, **where):
    with torch.no_grad():
        yield from teaching.taught_batches(part, cache, Runtime(), 16, shuffle, 0, 1, **where)
