"""Averaged weights: what the average is, and that a training which keeps it goes on after a kill."""

import dataclasses

import pytest
import torch
from torch import nn

from sparsekd import checkpoint
from sparsekd.runs.averaging import AveragedWeights

from .made_up import errors, network, same, student_of, trained, without_timings
from .test_epochs import Kill, stop_in


def stepped(decay, values):
    layer = nn.Linear(1, 1, bias=False)
    averaged = AveragedWeights(layer, decay)
    for value in values:
        nn.init.constant_(layer.weight, value)
        averaged.update()
    return layer, averaged


def averaging(decay, method=None, epochs=6):
    net = network(method, epochs)
    return dataclasses.replace(net, recipe=dataclasses.replace(net.recipe, averaged=decay))


def test_the_decay_grows_to_what_was_asked():
    layer, averaged = stepped(0.3, [1.0, 2.0, 4.0, 8.0])
    expected = 1.0
    for steps, value in ((2, 2.0), (3, 4.0), (4, 8.0)):
        decay = min(0.3, (1 + steps) / (10 + steps))
        expected = decay * expected + (1 - decay) * value
    with averaged.in_place():
        assert layer.weight.item() == pytest.approx(expected)
    assert layer.weight.item() == 8.0


def test_a_decay_of_zero_and_a_fresh_average_are_the_weights():
    for layer, averaged in (stepped(0.0, [1.0, 5.0]), stepped(0.9, [])):
        before = layer.weight.item()
        with averaged.in_place():
            assert layer.weight.item() == before
        assert averaged.average == []


def test_weights_come_back_where_scoring_fails():
    layer, averaged = stepped(0.9, [1.0, 5.0])
    with pytest.raises(ZeroDivisionError), averaged.in_place():
        assert 1 < layer.weight.item() < 5
        raise ZeroDivisionError
    assert layer.weight.item() == 5.0


def test_what_is_fixed_stays_out():
    layer = nn.Linear(2, 1)
    layer.bias.requires_grad_(False)
    averaged = AveragedWeights(layer, 0.5)
    averaged.update()
    assert [tensor.shape for tensor in averaged.average] == [layer.weight.shape]


def test_the_state_of_another_model_is_refused():
    state = stepped(0.9, [1.0, 2.0])[1].state_dict()
    with pytest.raises(ValueError, match="a model with other parameters"):
        AveragedWeights(nn.Linear(2, 1, bias=False), 0.9).load_state_dict(state)


def test_what_is_scored_is_what_is_kept(task, teacher, tmp_path):
    model, history = trained(task, averaging(0.9), tmp_path, teacher)
    best = checkpoint.load(student_of(task), tmp_path / "model.safetensors")
    stored = checkpoint.metadata(tmp_path / "model.safetensors")
    assert errors(best, task, task.val)["mse"] == pytest.approx(stored["val_mse"])
    assert stored["val_mse"] == pytest.approx(min(epoch["val_mse"] for epoch in history))
    plain, _ = trained(task, network(), tmp_path / "plain", teacher)
    assert same_weights(model, plain)  # the average takes no part in the training
    kept = checkpoint.load(student_of(task), tmp_path / "plain" / "model.safetensors")
    assert not same(kept, best)


def same_weights(left, right):
    return all(torch.equal(p, q) for p, q in zip(left.parameters(), right.parameters(), strict=True))


@pytest.mark.parametrize("method", ["sp-sad", "lth-sad"])
def test_a_run_goes_on_with_its_average(task, teacher, tmp_path, monkeypatch, method):
    whole, history = trained(task, averaging(0.9, method), tmp_path / "whole", teacher)
    for stop_after in (2, 4):
        with monkeypatch.context() as patch:
            stop_in(patch, stop_after, "after state")
            with pytest.raises(Kill):
                trained(task, averaging(0.9, method), tmp_path / "stopped", teacher)
    resumed, resumed_history = trained(task, averaging(0.9, method), tmp_path / "stopped", teacher)
    assert same(whole, resumed) and without_timings(history) == without_timings(resumed_history)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "stopped")]
    assert files[0] == files[1]
