"""A stream is scored before it is learnt, window by window, and goes on after a kill with the same bits."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from sparsekd.data import Rows, periods
from sparsekd.distill import Distiller, Plain
from sparsekd.goals import Click, Regression
from sparsekd.methods import METHODS, Method
from sparsekd.pruning import LinearSchedule
from sparsekd.runs import OutOfTime, Runtime, evaluate, stream
from sparsekd.runs.state import StateFile

from .made_up import same

ONLINE = stream.Online(lr=1e-2, weight_decay=1e-3, batch_size=32)
GOALS = {"click": Click(), "regression": Regression((-3.0, 3.0))}


def windows_of(goal, count=6, rows=96):
    """`count` windows of a day each; the target follows two of the features."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count * rows, 8, generator=generator)
    signal = 2 * x[:, 0] + x[:, 1] + 0.5 * torch.randn(count * rows, generator=generator)
    target = (signal > 0).float() if isinstance(goal, Click) else signal.clamp(-3, 3)
    times = np.arange(count * rows) / rows
    return periods(Rows((x,), target, x.numpy()), times, list(range(count + 1)))


class Net(nn.Module):
    """Features [B, 8] -> [B]; batch norm and dropout have a state that a resumed run must find again."""

    def __init__(self):
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.1))
        self.head = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, x):
        return self.head(self.hidden(x)).squeeze(1)


def method_of(name, goal, count=6):
    torch.manual_seed(0)
    student = Net()
    if name == "plain":
        return Method(Plain(student, goal))
    if name == "taught":
        return Method(Distiller(Net().eval(), student, (), (), goal=goal, alpha=0.5, beta=0.0))
    schedule = LinearSchedule(rate=0.25, every=2, final=0.5)
    return METHODS[name](Plain(student, goal), schedule, epochs=count, exclude=["head.2"])


def untimed(history):
    return [{key: value for key, value in one.items() if key not in ("seconds", "joules")} for one in history]


@pytest.mark.parametrize("goal", GOALS.values(), ids=GOALS)
def test_a_window_is_scored_before_it_is_learnt(goal):
    windows = windows_of(goal)
    method = method_of("plain", goal)
    fresh_scores = goal.scores(method.student, windows[0])
    history = stream.learn(method, windows, goal, ONLINE)
    assert {name: history[0][name] for name in fresh_scores} == fresh_scores
    ahead = method_of("plain", goal)  # the same stream but for its last window: what is scored there cannot know it
    stream.learn(ahead, windows[:-1], goal, ONLINE)
    assert goal.scores(ahead.student, windows[-1]) == {name: history[-1][name] for name in fresh_scores}
    judge = goal.judge.name
    assert history[-1][judge] < 0.75 * history[0][judge]  # and it learns
    assert history[-1]["loss"] < history[0]["loss"]
    assert [(one["window"], one["start"], one["end"], one["rows"]) for one in history] == [
        (number, number - 1.0, float(number), 96) for number in range(1, 7)
    ]


def test_rows_are_learnt_in_the_order_in_which_they_come():
    goal = Regression()
    windows, seen = windows_of(goal), []
    method = method_of("plain", goal)
    loss = method.loss
    method.loss = lambda inputs, target: seen.append(inputs[0]) or loss(inputs, target)
    stream.learn(method, windows, goal, ONLINE)
    assert torch.equal(torch.cat(seen), torch.cat([window.rows.inputs[0] for window in windows]))


@pytest.mark.parametrize("name", list(METHODS)[:2])
def test_methods_prune_at_the_boundaries_of_windows(name):
    goal = Click()
    method, numbers = method_of(name, goal), []
    after = method.after_boundary
    method.after_boundary = lambda number: numbers.append(number) or after(number)
    history = stream.learn(method, windows_of(goal), goal, ONLINE)
    assert numbers == [1, 2, 3, 4, 5, 6]
    assert [one["pruned"] for one in history] == [False, True, False, True, False, False]
    assert [one["rewound"] for one in history] == [one["pruned"] and name == "lth-sad" for one in history]
    densities = [one["density"] for one in history]
    assert densities[:2] == [1.0, 1.0] and densities == sorted(densities, reverse=True)
    assert evaluate.kept_share(method.student) == densities[-1] < 0.7


class Kill(Exception):
    pass


@pytest.mark.parametrize("at", ["before state", "after state"])
@pytest.mark.parametrize("name", ["plain", "taught", "sp-sad", "lth-sad"])
def test_resume_is_bit_identical(name, at, tmp_path, monkeypatch):
    goal = Click()
    windows = windows_of(goal)
    whole = method_of(name, goal)
    history = stream.learn(whole, windows, goal, ONLINE, state=tmp_path / "whole")
    save = StateFile.save
    for stop_after in (1, 2, 5):

        def killed(self, history, stop_after=stop_after):
            if at == "before state" and len(history) == stop_after:
                raise Kill
            save(self, history)
            if at == "after state" and len(history) == stop_after:
                raise Kill

        with monkeypatch.context() as patch:
            patch.setattr(StateFile, "save", killed)
            with pytest.raises(Kill):
                stream.learn(method_of(name, goal), windows, goal, ONLINE, state=tmp_path / "stopped")
    torch.manual_seed(99)  # another process has another random state
    resumed = method_of(name, goal)
    assert untimed(stream.learn(resumed, windows, goal, ONLINE, state=tmp_path / "stopped")) == untimed(history)
    assert same(whole.student, resumed.student)


def test_stops_in_time_and_goes_on(tmp_path):
    goal = Regression()
    windows = windows_of(goal)
    whole = stream.learn(method_of("plain", goal), windows, goal, ONLINE)
    stops = 0
    while True:
        try:  # a window a call
            short = stream.learn(
                method_of("plain", goal), windows, goal, ONLINE, state=tmp_path / "state", runtime=Runtime(deadline=0.0)
            )
            break
        except OutOfTime as stopped:
            stops += 1
            assert str(stopped) == f"{stops} of 6 windows"
    assert stops == 5 and untimed(short) == untimed(whole)


def test_other_settings_windows_and_orders_are_refused(tmp_path):
    goal = Regression()
    windows = windows_of(goal)
    stream.learn(method_of("plain", goal), windows, goal, ONLINE, state=tmp_path / "state", settings={"lr": 1})
    with pytest.raises(ValueError, match="its lr is 1, now 2"):
        stream.learn(method_of("plain", goal), windows, goal, ONLINE, state=tmp_path / "state", settings={"lr": 2})
    with pytest.raises(ValueError, match="its windows is"):
        shorter = windows[:3]
        stream.learn(method_of("plain", goal), shorter, goal, ONLINE, state=tmp_path / "state", settings={"lr": 1})
    with pytest.raises(ValueError, match=r"window 2 must not start before the end of the one before it, got 0 < 2"):
        stream.learn(method_of("plain", goal), [windows[1], windows[0]], goal, ONLINE)


def test_a_method_that_plans_fewer_windows_is_refused_before_any_is_learnt():
    goal = Regression()
    method = method_of("sp-sad", goal, count=5)
    before = {name: tensor.clone() for name, tensor in method.student.state_dict().items()}
    with pytest.raises(ValueError, match=r"sp-sad plans 5 windows, got 6; make it with epochs=6"):
        stream.learn(method, windows_of(goal), goal, ONLINE)
    assert all(torch.equal(before[name], tensor) for name, tensor in method.student.state_dict().items())


def test_divergence_names_the_window():
    goal = Regression()
    windows = windows_of(goal)
    rows = dataclasses.replace(windows[1].rows, target=windows[1].rows.target * float("nan"))
    windows[1] = dataclasses.replace(windows[1], rows=rows)
    with pytest.raises(RuntimeError, match=r"diverged in window 2, 1\.\.2 .*lower the learning rate \(0\.01\)"):
        stream.learn(method_of("plain", goal), windows, goal, ONLINE)


def test_windows_that_are_added_are_learnt_behind_those_of_before(tmp_path):
    goal = Click()
    windows = windows_of(goal)
    whole = stream.learn(method_of("plain", goal), windows, goal, ONLINE)
    stream.learn(method_of("plain", goal), windows[:2], goal, ONLINE, state=tmp_path / "state")
    again = stream.learn(method_of("plain", goal), windows, goal, ONLINE, state=tmp_path / "state")
    assert untimed(again) == untimed(whole)
    moved = [windows[0], dataclasses.replace(windows[1], end=1.5), *windows[2:]]
    with pytest.raises(ValueError, match="its windows is"):
        stream.learn(method_of("plain", goal), moved, goal, ONLINE, state=tmp_path / "state")


def test_windows_may_come_one_by_one():
    goal = Click()
    windows = windows_of(goal)
    whole = stream.learn(method_of("plain", goal), windows, goal, ONLINE)
    assert untimed(stream.learn(method_of("plain", goal), iter(windows), goal, ONLINE)) == untimed(whole)
    with pytest.raises(ValueError, match=r"window 2 must not start before the end of the one before it, got 0 < 2"):
        stream.learn(method_of("plain", goal), iter([windows[1], windows[0]]), goal, ONLINE)


def test_windows_of_one_class_of_no_row_and_of_nan():
    goal = Click()
    windows = windows_of(goal)
    rows = dataclasses.replace(windows[1].rows, target=torch.zeros(96))
    history = stream.learn(
        method_of("plain", goal), [windows[0], dataclasses.replace(windows[1], rows=rows)], goal, ONLINE
    )
    assert history[1]["normalised_entropy"] is None and history[1]["cumulated"]["normalised_entropy"] > 0
    empty = dataclasses.replace(windows[1], rows=windows[1].rows.take(slice(0, 0)))
    with pytest.raises(ValueError, match=r"window 2, 1\.\.2, has no row; join it to one beside it"):
        stream.learn(method_of("plain", goal), [windows[0], empty], goal, ONLINE)
    x = windows[1].rows.inputs[0].clone()
    x[7, 3] = float("nan")
    broken = dataclasses.replace(windows[1], rows=dataclasses.replace(windows[1].rows, inputs=(x,)))
    with pytest.raises(ValueError, match="window 2 has NaN or infinity in input 0 of row 7"):
        stream.learn(method_of("plain", goal), [windows[0], broken], goal, ONLINE)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"lr": -1.0}, "lr must be a finite number >= 0, got -1"),
        ({"lr": float("nan")}, "lr must be a finite number >= 0, got nan"),
        ({"lr": 0.1, "weight_decay": float("inf")}, "weight_decay must be a finite number"),
        ({"lr": 0.1, "batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_rates_that_mean_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=rf"Online: {message}"):
        stream.Online(**options)
