"""A serving model is swapped under threads that call it: every answer is one model's, and nobody waits."""

import threading
import time

import pytest
import torch
from torch import nn

import sparsekd
from sparsekd import ServingModel
from sparsekd.pruning import Pruner

X = torch.ones(4, 8)


class Constant(nn.Module):
    """Answers its number twice, by two layers with a pause between: a torn model would answer two numbers."""

    def __init__(self, number):
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(8, 16)
        for layer in (self.first, self.second):
            nn.init.zeros_(layer.weight)
            nn.init.constant_(layer.bias, float(number))

    def forward(self, x):
        first = self.first(x)
        time.sleep(0)  # another thread may run here
        return torch.cat([first, self.second(x)], 1)


def frozen(number):
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 32))
    Pruner(model).prune_to(0.5)
    for layer in model[::2]:
        nn.init.zeros_(layer.values)
    nn.init.constant_(model[2].bias, float(number))
    return sparsekd.freeze(model.eval(), (X,), layer_ms=1.0, min_gain=0)


@pytest.mark.parametrize("make", [Constant, frozen])
def test_four_threads_over_a_thousand_swaps_see_whole_models_only(make):
    networks = [make(number) for number in range(4 if make is frozen else 1_000)]
    serving = ServingModel(networks[0])
    stop, problems, longest = threading.Event(), [], [0.0] * 4
    calls, seen = [0] * 4, [set() for _ in range(4)]

    def ask(thread):
        latest = 0
        while not stop.is_set():
            began = time.perf_counter()
            answer, version = serving.answer(X)
            longest[thread] = max(longest[thread], time.perf_counter() - began)
            wanted = float((version - 1) % len(networks))
            if not (answer == wanted).all():
                problems.append((version, answer))
            if version < latest:
                problems.append(("back in time", version, latest))
            latest, calls[thread] = version, calls[thread] + 1
            seen[thread].add(version)

    threads = [threading.Thread(target=ask, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for swap in range(1, 1_000):
        serving.swap(networks[swap % len(networks)])
        time.sleep(0)
    while min(calls) < 10:
        time.sleep(0.001)
    stop.set()
    for thread in threads:
        thread.join()
    assert not problems and serving.version == 1_000
    assert len(set.union(*seen)) > 10  # they did see others than the first and the last
    assert max(longest) < 2.0  # nobody waited for the swaps


def test_a_call_is_not_held_up_by_the_check_of_a_slow_newcomer():
    serving, entered, leave = ServingModel(Constant(1)), threading.Event(), threading.Event()

    class Slow(Constant):
        def forward(self, x):
            entered.set()
            assert leave.wait(10)
            return super().forward(x)

    thread = threading.Thread(target=serving.swap, args=(Slow(2), (X,)))
    thread.start()
    assert entered.wait(10)
    assert serving.answer(X)[1] == 1  # while the new one is being checked
    leave.set()
    thread.join()
    assert serving.version == 2


class TwoInputs(nn.Module):
    def forward(self, x, y):
        return x + y


@pytest.mark.parametrize(
    ("network", "example"),
    [(Constant(1), X), (Constant(1), [X]), (TwoInputs(), (X, X)), (TwoInputs(), {"y": X, "x": X})],
    ids=["tensor", "list", "tuple", "mapping"],
)
def test_example_inputs_are_what_freeze_takes(network, example):
    serving = ServingModel()
    assert [serving.swap(network, example) for _ in range(2)] == [1, 2]
    with pytest.raises(TypeError, match="example_inputs must be a tensor or several, got int"):
        serving.swap(network, 3)
    assert serving.version == 2


def test_what_does_not_answer_is_not_swapped_in():
    serving = ServingModel(Constant(1))
    broken = Constant(float("nan"))
    with pytest.raises(ValueError, match="answers NaN or infinity, so that the old one stays"):
        serving.swap(broken, (X,))
    with pytest.raises(ValueError, match=r"answers torch.float32 \(4, 3\) where the old one answers .* \(4, 32\)"):
        serving.swap(nn.Linear(8, 3), (X,))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        serving.swap(nn.Linear(7, 32), (X,))
    assert serving.version == 1 and (serving(X) == 1).all()
    with pytest.raises(RuntimeError, match="there is no model yet"):
        ServingModel()(X)
