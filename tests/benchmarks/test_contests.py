"""The contests of the suites: every quick case builds, and what disagrees is not timed."""

import copy

import pytest
import torch
from torch import nn

import sparsekd
from benchmarks.lib import shapes
from benchmarks.lib.contest import Replay, Setup, agree, energy_info, seconds_info
from benchmarks.suites import embeddings, layers, losses, norms, students, training
from benchmarks.suites.networks import load
from sparsekd.energy import Comparison, Interval, Measurement
from sparsekd.models import WideResNet

SUITES = (layers, students, losses, norms, embeddings, training)
QUICK = Setup(quick=True, densities=(0.3,), batches=(4,))


@pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite.__name__)
def test_every_quick_case_builds_and_agrees_with_its_peer(suite):
    found = suite.cases(QUICK)
    assert len({case.id for case in found}) == len(found) > 0
    for case in found:
        contest = case.build()
        assert set(case.names) == set(contest.calls) | set(contest.absent)
        for call in contest.calls.values():
            call()


def test_the_full_suites_have_distinct_ids_and_both_networks():
    for suite in SUITES:
        ids = [case.id for case in suite.cases(Setup())]
        assert len(set(ids)) == len(ids)
    ids = " ".join(case.id for case in students.cases(Setup()))
    assert "rating-cnn-n512" in ids and "wrn-16-2-n64" in ids


def test_the_layers_of_a_network_are_measured_at_the_batches_asked_for():
    found = layers.layers_of(Setup(layers=("mlp", "cifar"), layer_batches=(1, 16)))
    assert len({layer.id for layer in found}) == len(found) == 2 * (len(shapes.LINEARS) + 9)
    (one,) = [layer for layer in found if layer.id == "cifar-64-64-16x16-k3s1-n16"]
    assert one.input == (16, 64, 16, 16) and one.build()(torch.rand(one.input)).shape == one.input
    assert {shape.group for shape in (*shapes.CONVS, *shapes.LINEARS)} == set(shapes.BATCHES)
    every = layers.cases(Setup(layers=tuple(shapes.BATCHES)))
    assert len({case.id for case in every}) == len(every)


def test_masked_and_compacted_keep_the_weights_that_they_say():
    (case,) = students.cases(QUICK)
    info = case.build().info
    assert info["dense"]["weights_share"] == info["masked"]["weights_share"] == 1.0
    assert 0.25 < info["ours"]["weights_share"] < 0.5  # 30 % of what is pruned; the rest stays dense
    assert info["compacted"]["weights_share"] == info["compacted_frozen"]["weights_share"]


def test_disagreement_and_nan_stop_a_benchmark():
    agree("a", torch.ones(3), torch.ones(3))
    for got in (torch.tensor([1.0, 1.0, 1.1]), torch.full((3,), float("nan"))):
        with pytest.raises(RuntimeError, match="a differs from its peer"):
            agree("a", got, torch.ones(3))


def test_wrong_gradients_stop_a_training_benchmark():
    ours = sparsekd.sparsify(nn.Sequential(nn.Linear(32, 32)), density=0.5)
    twin = sparsekd.densify(copy.deepcopy(ours))
    x = torch.rand(4, 32)
    for model in (ours, twin):
        model(x).square().mean().backward()
    training.agree_gradients("a", ours, twin, training.FLIPS)
    ours[0].values.grad *= 1.2
    with pytest.raises(RuntimeError, match=r"a: gradient of 0\.values differs"):
        training.agree_gradients("a", ours, twin, training.FLIPS)


def test_an_embedding_is_measured_with_a_dense_and_with_a_sparse_gradient():
    case = next(case for case in embeddings.cases(QUICK) if case.id.startswith("learn"))
    gradients = {name: call() for name, call in case.build().calls.items()}
    assert gradients["dense_sparse_grad"].is_sparse and not gradients["dense"].is_sparse
    torch.testing.assert_close(gradients["dense_sparse_grad"].to_dense(), gradients["dense"])


def test_own_models_are_loaded_by_name():
    assert isinstance(load("benchmarks.lib.models:wrn_16_2"), WideResNet)
    with pytest.raises(ValueError, match=r"package\.module:factory"):
        load("torch.nn.Linear")
    with pytest.raises(ValueError, match=r"must make an nn\.Module, got dict"):
        load("builtins:dict")


def test_layers_of_an_own_model_are_measured_at_the_inputs_they_get():
    setup = Setup(
        model="benchmarks.lib.models:wrn_16_2", input_shapes=((3, 32, 32),), layer_batches=(2,), exclude=("stem",)
    )
    found = layers.cases(setup)
    assert not any("stem" in case.id for case in found)
    shapes = {layer.id.split("n2-")[1]: layer.input for layer in layers.layers_of_model(setup)}
    assert shapes["blocks.2.conv1"] == (2, 32, 32, 32) and shapes["head"] == (2, 128)
    assert len(shapes) == 10  # of 16 layers: in each stage, three convolutions are alike


def test_replayed_samples_are_the_samples():
    timer = Replay()
    timer.load([0.25, 0.5])
    times = [timer() for _ in range(4)]
    assert [times[1] - times[0], times[3] - times[2]] == [0.25, 0.5]


def test_extra_info_has_the_speedup_and_the_joules():
    def measured(seconds, joules):
        return Measurement(seconds, joules, joules / seconds, "rapl", 10, 60, None, (seconds,) * 7, (joules,) * 7)

    found = Comparison(
        "dense",
        {"dense": measured(2.0, 50.0), "ours": measured(1.0, 20.0)},
        {"ours": Interval(0.5, 0.4, 0.625, 0.98)},
        {"ours": Interval(0.4, 0.3, 0.5, 0.98)},
    )
    info = seconds_info(found, "ours")
    assert (info["speedup_low"], info["speedup"], info["speedup_high"]) == (1.6, 2.0, 2.5)
    assert "speedup" not in seconds_info(found, "dense")
    info = energy_info(found, "ours")
    assert (info["joules"], info["watts"], info["source"], info["joules_ratio"]) == (20.0, 20.0, "rapl", 0.4)
