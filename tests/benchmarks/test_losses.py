"""`benchmarks.attention`: losses are compared before they are timed, and each is compiled for its own shapes."""

import functools

import pytest
import torch

from benchmarks import attention


def test_gradients_of_half_maps_are_compared_where_float16_can_hold_them():
    x, tie = torch.ones(4, dtype=torch.float16, requires_grad=True), 1.5 * 2.0**-24  # between two float16 numbers

    def loss(slope):
        return lambda: ((x.float() - 1) * slope).sum() + 1

    attention.check("right", [loss(tie * 1.0001), loss(tie * 0.9999)], [x])
    with pytest.raises(RuntimeError, match="wrong: results differ"):
        attention.check("wrong", [loss(tie), loss(tie * 1.05)], [x])


def test_on_a_gpu_the_device_is_timed_and_not_python(monkeypatch):
    """The calls themselves are handed to the timer of queues, with no wait for the device in them."""
    asked = []

    def samples(calls, seconds, *, rounds, device):
        asked.append(device)
        return {name: [1e-6] for name in calls}

    monkeypatch.setattr(attention.timing, "samples", samples)
    pair = attention.Pair("small", 2, ((8, 4, 1),), ((8, 4, 1),))
    attention.measure(pair, False, torch.float32, "cpu", False, 1e-4)
    attention.measure_kd("cpu", False, 1e-4)
    assert len(asked) == 7 and set(asked) == {torch.device("cpu")}


def test_each_case_is_compiled_for_its_own_shapes(monkeypatch):
    """After other shapes of the same function, too: shapes that may vary make the compiled contestant slower."""
    graphs = []

    def backend(graph, inputs):
        graphs.append([each for each in inputs if isinstance(each, torch.SymInt)])
        return graph

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    for batch, side in ((4, 8), (6, 6)):
        pair = attention.Pair("small", batch, ((8, side, 1),), ((8, side, 1),))
        attention.measure(pair, False, torch.float32, "cpu", True, 1e-4)
    assert len(graphs) >= 6 and not any(graphs)
