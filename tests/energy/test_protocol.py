"""measure and compare."""

import dataclasses
import itertools
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsekd.energy import EnergyMeter, compare, measure, median_interval

from .hardware import Board, FakeNVML, make_machine


def call(board: Board, seconds: float, watts: float):
    return lambda: board.advance(seconds, watts)


def test_measure_without_a_counter_gives_seconds_alone(board):
    found = measure(call(board, 0.004, 100.0), device="cpu", machine=make_machine(board))
    assert found.seconds_per_call == pytest.approx(0.004)
    assert found.joules_per_call is None and found.round_joules is None and found.watts is None
    assert found.source == "unavailable" and "rapl" in found.reason
    assert len(found.round_seconds) == 5 and found.calls == 250


def test_compare_gives_ratios_of_seconds_and_joules(board):
    nvml = FakeNVML(board, tick=0.1)
    functions = {"dense": call(board, 0.010, 300.0), "sparse": call(board, 0.004, 250.0)}
    found = compare(functions, device="cuda", machine=make_machine(board, nvml=nvml))
    dense, sparse = found.measurements["dense"], found.measurements["sparse"]
    assert dense.joules_per_call == pytest.approx(3.0, rel=0.03)
    assert sparse.joules_per_call == pytest.approx(1.0, rel=0.03)
    assert dense.warning is None and dense.ticks >= 50  # windows were made long enough for the counter
    assert found.baseline == "dense" and set(found.seconds_ratio) == {"sparse"}
    assert found.seconds_ratio["sparse"].value == pytest.approx(0.4)
    joules = found.joules_ratio["sparse"]
    assert joules.low <= joules.value <= joules.high and joules.value == pytest.approx(1 / 3, rel=0.05)
    assert joules.confidence == pytest.approx(1 - 2 * 0.5**7)
    assert nvml.opened == 0
    json.dumps(dataclasses.asdict(found))


def test_a_training_step_is_compared_as_an_inference_is(board):
    torch = pytest.importorskip("torch")
    weight, steps = torch.zeros(3, requires_grad=True), []
    optimizer = torch.optim.SGD([weight], lr=1e-3)

    def training_step() -> None:
        optimizer.zero_grad()
        (weight - 1).square().sum().backward()
        optimizer.step()
        steps.append(float(weight.detach()[0]))
        board.advance(0.03, 300.0)

    @torch.inference_mode()
    def inference() -> None:
        weight.sum()
        board.advance(0.01, 200.0)

    machine = make_machine(board, nvml=FakeNVML(board, tick=0.02))
    found = compare({"inference": inference, "training": training_step}, device="cuda", machine=machine, rounds=6)
    assert steps == sorted(steps) and 0 < steps[-1] < 1  # it has trained, and goes on from window to window
    assert len(steps) > 6 * found.measurements["training"].calls
    assert found.joules_ratio["training"].value == pytest.approx(4.5, rel=0.05)
    assert found.joules_ratio["training"].low <= 4.5 * 1.05 and found.measurements["training"].warning is None


def test_windows_alternate_so_that_drift_cancels(board):
    """The machine slows down by the same step at every window; the ratio of equal functions must not see it."""
    order = []

    def work(name: str):
        def run() -> None:
            order.append(name)
            board.advance(0.01 * (1 + len(order) / 1e4), 100.0)

        return run

    found = compare({"a": work("a"), "b": work("b")}, seconds=0.1, warmup=0.1, rounds=8, machine=make_machine(board))
    a, b = (["a"] * found.measurements["a"].calls, ["b"] * found.measurements["b"].calls)
    assert order[-8 * len(a + b) :] == (a + b + b + a) * 4
    assert found.seconds_ratio["b"].value == pytest.approx(1.0, abs=5e-4)
    assert found.seconds_ratio["b"].low < 1.0 < found.seconds_ratio["b"].high


def test_warm_up_goes_on_until_the_time_settles(board):
    calls = itertools.count()
    work = measure(
        lambda: board.advance(0.01 + 0.2 * 0.9 ** next(calls), 100.0), warmup=0.5, machine=make_machine(board)
    )
    assert work.warning is None and work.seconds_per_call == pytest.approx(0.01, rel=0.1)


def test_idle_above_the_work_leaves_no_ratio_of_joules(board):
    board.idle_watts = 300.0
    machine = make_machine(board, nvml=FakeNVML(board, tick=0.01))
    meter = EnergyMeter("cuda", idle_seconds=1.0, machine=machine)
    found = compare({"a": call(board, 0.01, 200.0), "b": call(board, 0.01, 400.0)}, meter=meter, machine=machine)
    meter.close()
    assert found.measurements["a"].joules_per_call == pytest.approx(-1.0, rel=0.05)
    assert found.joules_ratio == {"b": None}


def test_cool_down_rests_before_every_window(board):
    def total(cooldown: float) -> float:
        began_at = board.clock()
        measure(call(board, 0.01, 100.0), machine=make_machine(board), device="cpu", cooldown=cooldown)
        return board.clock() - began_at

    assert total(3.0) - total(0.0) == pytest.approx(5 * 3.0)


def test_work_that_never_settles_is_flagged(board):
    calls = itertools.count()
    found = measure(lambda: board.advance(0.01 * 1.2 ** next(calls), 100.0), warmup=0.5, machine=make_machine(board))
    assert "did not settle" in found.warning


def test_one_lost_window_leaves_no_joules(board):
    nvml = FakeNVML(board, tick=0.01)
    board.on_advance.append(
        lambda: nvml.fails.update(nvmlDeviceGetTotalEnergyConsumption=15) if board.clock() > 8 else None
    )
    functions = {"dense": call(board, 0.010, 300.0), "sparse": call(board, 0.004, 250.0)}
    found = compare(functions, device="cuda", machine=make_machine(board, nvml=nvml))
    assert found.measurements["dense"].joules_per_call is None and "Xid" in found.measurements["dense"].reason
    assert found.joules_ratio == {"sparse": None}
    assert found.seconds_ratio["sparse"].value == pytest.approx(0.4)


def test_an_own_meter_with_idle_power_stays_open(board):
    board.idle_watts = 100.0
    nvml = FakeNVML(board, tick=0.01)
    machine = make_machine(board, nvml=nvml)
    meter = EnergyMeter("cuda", idle_seconds=1.0, machine=machine)
    found = measure(call(board, 0.01, 300.0), meter=meter, machine=machine, cooldown=0.5)
    assert found.joules_per_call == pytest.approx(2.0, rel=0.05)
    assert found.idle_subtracted == pytest.approx(1.0, rel=0.05)
    assert nvml.opened == 1
    meter.close()
    assert nvml.opened == 0


@pytest.mark.parametrize(
    "options", [{"rounds": 0}, {"seconds": 0.0}, {"seconds": math.inf}, {"warmup": -1.0}, {"cooldown": math.nan}]
)
def test_compare_refuses_bad_arguments(board, options):
    with pytest.raises(ValueError, match=r"energy\.compare"):
        compare({"a": lambda: None}, machine=make_machine(board), **options)
    with pytest.raises(ValueError, match=r"energy\.compare"):
        compare({}, machine=make_machine(board))


def test_median_interval_by_hand():
    # n = 6: 1 - 2/64. n = 10: 1 - 2 (1 + 10)/1024. n = 3: 1 - 2/8, less than asked for and said so.
    assert dataclasses.astuple(median_interval([6, 1, 5, 2, 4, 3])) == (3.5, 1, 6, 0.96875)
    assert dataclasses.astuple(median_interval(list(range(10)))) == (4.5, 1, 8, 1 - 22 / 1024)
    assert dataclasses.astuple(median_interval([3.0, 1.0, 2.0])) == (2.0, 1.0, 3.0, 0.75)
    assert dataclasses.astuple(median_interval([2.0])) == (2.0, 2.0, 2.0, 0.0)
    with pytest.raises(ValueError, match="at least one"):
        median_interval([])


@pytest.mark.parametrize("n", [5, 6, 9, 12])
def test_median_interval_covers_as_often_as_it_says(n):
    """Over all 2^n ways to fall below or above the median, count those whose order statistics still straddle it."""
    covered = 0
    for signs in itertools.product([-1.0, 1.0], repeat=n):
        interval = median_interval(signs, confidence=0.9)
        covered += interval.low < 0 < interval.high
    assert covered / 2**n == pytest.approx(interval.confidence)


@given(st.lists(st.floats(0.1, 10.0), min_size=1, max_size=40), st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_median_interval_properties(values, confidence):
    interval = median_interval(values, confidence)
    assert min(values) <= interval.low <= interval.value <= interval.high <= max(values)
    assert interval == median_interval(values[::-1], confidence)
    assert interval.confidence >= confidence or (interval.low, interval.high) == (min(values), max(values))
