"""The timer: turns, loops, clocks, and on a GPU a queue of work whose simulation says what really takes how long."""

import time
import warnings

import pytest
import torch

from sparsekd import timing


class Clock:
    """Each call advances it by what the call takes."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def call(self, seconds):
        def function():
            self.now += seconds

        return function


def test_medians_are_those_of_the_calls():
    clock = Clock()
    taken = timing.samples({"slow": clock.call(3e-3), "fast": clock.call(1e-6)}, 1.0, clock=clock)
    assert {name: pytest.approx(column[0]) for name, column in taken.items()} == {"slow": 3e-3, "fast": 1e-6}
    assert len(taken["slow"]) == len(taken["fast"]) >= timing.LEAST_ROUNDS
    medians = timing.medians({"one": lambda: time.sleep(1e-3)}, 0.01)
    assert 1e-3 <= medians["one"] < 0.1


def test_at_least_five_rounds_and_no_more_than_the_time_allows():
    clock = Clock()
    assert len(timing.samples({"slow": clock.call(10.0)}, 1.0, clock=clock)["slow"]) == timing.LEAST_ROUNDS
    clock = Clock()
    assert len(timing.samples({"fast": clock.call(1e-2)}, 1.0, clock=clock)["fast"]) == pytest.approx(100, abs=4)


def test_rounds_that_are_asked_for_share_the_time():
    clock, called = Clock(), []

    def function():
        called.append(1)
        clock.now += 1e-4

    taken = timing.samples({"one": function}, 1.0, rounds=10, clock=clock)["one"]
    assert len(taken) == 10 and len(called) == 2 + 10 * 1000


def test_every_other_round_is_in_reverse():
    assert list(timing.in_turns("ab", 3)) == [["a", "b"], ["b", "a"], ["a", "b"]]


# ---- On a GPU


class Gpu:
    """A device and a host with clocks of their own. A launch costs the host ``launch`` seconds; work waits its turn."""

    def __init__(self, monkeypatch, launch=60e-6):
        self.host = self.free_at = 0.0
        self.launch, self.sleeps = launch, []
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event(self))
        monkeypatch.setattr(torch.cuda, "_sleep", self.sleep, raising=False)
        monkeypatch.setattr(torch.cuda, "device", lambda device: warnings.catch_warnings(record=False))

    def run(self, seconds):
        self.host += self.launch
        self.free_at = max(self.host, self.free_at) + seconds

    def sleep(self, cycles):
        self.sleeps.append(cycles)
        self.run(cycles / 2e9)

    def wait(self):
        self.host = max(self.host, self.free_at)


class Event:
    def __init__(self, gpu):
        self.gpu = gpu

    def record(self):
        self.gpu.host += 2e-6
        self.at = max(self.gpu.host, self.gpu.free_at)

    def query(self):
        return self.at <= self.gpu.host

    def synchronize(self):
        self.gpu.host = max(self.gpu.host, self.at)

    def elapsed_time(self, other):
        return 1e3 * (other.at - self.at)


CUDA = torch.device("cuda", 0)


def test_what_is_timed_is_the_device_and_not_python(monkeypatch):
    """A kernel of 12 us that Python needs 60 us to launch; timed call by call it would seem to take 60."""
    gpu = Gpu(monkeypatch)
    calls = {"ours": lambda: gpu.run(12e-6), "dense": lambda: gpu.run(20e-6)}
    medians = timing.medians(calls, 0.01, device=CUDA)
    assert medians == {"ours": pytest.approx(12e-6), "dense": pytest.approx(20e-6)}


def test_the_device_sleeps_until_the_host_is_ahead(monkeypatch):
    gpu = Gpu(monkeypatch, launch=300e-6)
    assert timing.medians({"ours": lambda: gpu.run(5e-6)}, 0.01, device=CUDA)["ours"] == pytest.approx(5e-6)
    assert gpu.sleeps[0] == timing.SLEEP_CYCLES < max(gpu.sleeps) < timing.MOST_SLEEP_CYCLES


def test_on_a_device_the_time_is_that_of_all_calls_too(monkeypatch):
    """Two calls of 1 ms, two to a queue: a round takes 4 ms."""
    gpu = Gpu(monkeypatch)
    calls = {name: lambda: gpu.run(1e-3) for name in ("ours", "dense")}
    taken = timing.samples(calls, 42e-3, device=CUDA)
    assert [len(column) for column in taken.values()] == [10, 10]


def test_a_call_that_waits_for_the_device_is_named(monkeypatch):
    gpu = Gpu(monkeypatch)

    def waits():
        gpu.run(10e-6)
        gpu.wait()

    with pytest.warns(UserWarning, match="waits: waits for the device itself|waits waits for the device itself"):
        timing.medians({"waits": waits}, 0.01, device=CUDA)
