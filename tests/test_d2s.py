"""D2S: the full model learns as if it were alone, the copy is sparse, follows it, and takes over without a gap."""

import copy

import pytest
import torch
from torch import nn

import sparsekd
from sparsekd import Click, ServingModel
from sparsekd.data.streams import DriftingClicks
from sparsekd.distill import Distiller, Plain
from sparsekd.methods import D2S, Method, OnlinePruned, d2s
from sparsekd.models import DLRM, WideAndDeep
from sparsekd.nn import BlockSparseLayer
from sparsekd.pruning import Budget, CostTable, LayerCost, count_macs
from sparsekd.pruning.cost import network_of
from sparsekd.runs import stream
from sparsekd.runs.state import StateFile

from .runs.made_up import same

ONLINE = stream.Online(lr=3e-3, batch_size=100)


def clicks(windows=5, rows=300, **options):
    return DriftingClicks("abrupt", windows=windows, rows=rows, every=3, features=24, active=6, **options)


def model_of(kind=WideAndDeep, **options):
    torch.manual_seed(0)
    sizes = {"top": (48, 48), "bottom": (32,)} if kind is DLRM else {"hidden": (48, 48)}
    return kind(24, 2, rows=500, dim=8, **sizes, **options)


def method_of(model=None, budget=0.8, **options):
    model = model or model_of()
    examples = next(iter(clicks())).examples(8)
    return D2S(
        Plain(model, Click()),
        budget,
        every=2,
        exclude=model.not_pruned,
        example_inputs=examples,
        **({"trigger": 9.0, "accept": 9.0, "compare": False} | options),
    )


def untimed(history):
    return [{key: value for key, value in one.items() if key not in ("seconds", "joules")} for one in history]


@pytest.mark.parametrize("kind, options", [(WideAndDeep, {}), (DLRM, {"ids_by": "listed", "table": "sparse"})])
def test_the_full_model_learns_as_if_it_were_alone_and_the_copy_is_sparse(kind, options):
    alone = Method(Plain(model_of(kind, **options), Click()))
    stream.learn(alone, clicks(), Click(), ONLINE)
    method = method_of(model_of(kind, **options))
    history = stream.learn(method, clicks(), Click(), ONLINE)
    assert same(alone.student, method.student)
    assert [one["pruned"] for one in history] == [True, False, True, False, True]
    assert history[0]["density"] == 1.0 and 0.19 < history[-1]["density"] < 0.21
    assert method.handed_over == 3 and method.pruner.removed_share == pytest.approx(0.8, abs=0.01)
    kept = {name: layer.num_kept / layer.num_weights for name, layer in method.pruner.layers().items()}
    assert len(kept) >= 2 and min(kept.values()) >= 0.02
    assert max(kept.values()) > 1.2 * min(kept.values())  # nobody said how sparse each layer is to be
    assert all(isinstance(layer, BlockSparseLayer) for layer in method.pruner.layers().values())
    assert not any(isinstance(module, BlockSparseLayer) for module in method.student.modules())


def test_a_convolution_is_pruned_as_well():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.head = nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.Linear(32, 1)

        def forward(self, x):
            return self.head(self.bn(self.conv(x)).relu().mean((2, 3))).squeeze(1)

    torch.manual_seed(0)
    model, x = Net(), torch.randn(64, 3, 8, 8)
    options = {"accept": 9.0, "trigger": 9.0, "compare": False}
    method = D2S(
        Plain(model, Click()), Budget("macs", 0.7, removed=True), **options, exclude=["head"], example_inputs=(x,)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    method.attach(optimizer)
    for number in range(1, 6):  # any loop over any batches
        for part in x.split(16):
            optimizer.zero_grad()
            method.loss((part,), (part.mean((1, 2, 3)) > 0).float()).total.backward()
            optimizer.step()
            method.after_step()
        method.after_boundary(number)
    dense, kept = count_macs(method.serving_student, (x[:2],), ["head"])
    assert kept / dense == pytest.approx(0.3, abs=0.03) and method.handed_over == 2


class Kill(Exception):
    pass


@pytest.mark.parametrize("share, compare", [(True, True), (False, True), (True, False)])
def test_resume_is_bit_identical_also_after_a_kill_in_mid_hand_over(share, compare, tmp_path, monkeypatch):
    def run(state, **options):
        method = method_of(share_tables=share, compare=compare, **options)
        return stream.learn(method, clicks(), Click(), ONLINE, state=tmp_path / state), method

    history, whole = run("whole")
    save, prune = StateFile.save, d2s.prune_in_rounds

    def killed_save(self, history):
        save(self, history)
        if len(history) == 2:
            raise Kill

    def killed_prune(*arguments):
        prune(*arguments)
        raise Kill

    serving = ServingModel()
    for target, name, replacement in ((StateFile, "save", killed_save), (d2s, "prune_in_rounds", killed_prune)):
        with monkeypatch.context() as patch, pytest.raises(Kill):
            patch.setattr(target, name, replacement)
            run("stopped", serving=serving)
    assert serving.version == 2 and torch.isfinite(serving(*next(iter(clicks())).examples(4))).all()
    torch.manual_seed(99)
    again, resumed = run("stopped")
    assert untimed(again) == untimed(history)
    assert same(whole.student, resumed.student) and same(whole.serving_student, resumed.serving_student)


def test_what_serves_is_the_copy_frozen_and_stands_alone(tmp_path):
    serving, seen = ServingModel(), []
    swap = serving.swap
    serving.swap = lambda *given: seen.append(swap(*given)) or seen[-1]
    method = method_of(serving=serving, freezing={"layer_ms": 1.0})
    stream.learn(method, clicks(windows=3), Click(), ONLINE)
    assert seen == [1, 2, 3]  # brought up to date at the end of every window
    inputs = next(iter(clicks())).examples(16)
    expected = method.serving_student.eval()(*inputs)
    torch.testing.assert_close(serving(*inputs), expected, rtol=1e-4, atol=1e-5)
    assert isinstance(serving.network, sparsekd.FrozenModel)
    serving.network.save(tmp_path / "serving")
    with torch.no_grad():
        for parameter in method.student.parameters():  # the full model goes on; what serves does not move
            parameter.zero_()
    torch.testing.assert_close(serving(*inputs), expected, rtol=1e-4, atol=1e-5)
    read = sparsekd.load_frozen(tmp_path / "serving", model_of())
    torch.testing.assert_close(read(*inputs), expected, rtol=1e-4, atol=1e-5)


def test_a_copy_that_is_worse_does_not_serve(monkeypatch):
    method = method_of(accept=0.01)
    source = clicks()
    stream.learn(method, [next(iter(source))], Click(), ONLINE)
    first = method.sparse
    prune = d2s.prune_in_rounds

    def spoil(pruner, *rest):
        prune(pruner, *rest)
        for layer in pruner.layers().values():
            layer.values.data.mul_(-30)

    monkeypatch.setattr(d2s, "prune_in_rounds", spoil)
    window = next(iter(source))
    method.loss(*next(window.batches(100)))
    assert method.after_boundary(3) is None
    assert method.sparse is first and (method.handed_over, method.refused) == (1, 1)


def spoil(copy):
    for layer in copy.pruner.layers().values():
        layer.values.data.mul_(-30)


def test_of_two_copies_that_learn_a_window_the_better_one_stays():
    method = method_of(compare=True)
    method.attach(torch.optim.SGD(method.student.parameters(), lr=1e-3))
    source = iter(clicks(windows=12))

    def learn(number):
        for batch in next(source).batches(100):
            method.student.zero_grad()
            method.loss(*batch).total.backward()
            method.after_step()
        return method.after_boundary(number)

    assert learn(1).stage == "hand-over" and method.beside is None  # nothing to compare the first one with
    first = method.sparse
    learn(2)
    assert learn(3) is None and method.sparse is first  # the new one is only tried
    spoil(method.beside)
    assert learn(4) is None and method.sparse is first
    assert (method.beside, method.handed_over, method.refused) == (None, 1, 1)
    assert learn(5) is None
    better = method.beside
    spoil(first)
    assert learn(6).stage == "hand-over" and method.sparse is better and method.newer_was_better
    assert learn(7).stage == "hand-over" and method.sparse is not better  # as the last one was, it serves at once
    spoil(method.sparse)
    assert learn(8).stage == "hand-back" and method.sparse is better and not method.newer_was_better
    assert learn(9) is None and method.sparse is better
    assert (method.handed_over, method.refused) == (3, 2)


def test_a_copy_that_falls_behind_is_replaced_before_its_turn():
    def pruned(**options):
        method = method_of(**options)
        history = stream.learn(method, clicks(windows=4, rows=300), Click(), ONLINE)
        return [one["pruned"] for one in history]

    assert pruned() == [True, False, True, False]
    assert pruned(trigger=-0.9) == [True, True, True, True]  # any copy is beyond that


def test_memory_does_not_grow_with_the_stream():
    method = method_of(remember=3)
    sizes = []
    for number, window in enumerate(clicks(windows=6, rows=1_000), 1):
        for batch in window.batches(100):
            method.loss(*batch)
        assert len(method._recent) == 3
        method.attach(torch.optim.SGD(method.student.parameters(), lr=0.0))
        method.after_boundary(number)
        sizes.append(sum(t.numel() for t in method.sparse.model.state_dict().values()))
    assert max(sizes) - min(sizes) < 0.02 * min(sizes) and not method._recent


@pytest.mark.parametrize("unit", ["macs", "bytes", "latency_us"])
def test_a_budget_in_any_unit(unit):
    costs, budget = None, Budget(unit, 0.5, removed=True)
    if unit == "latency_us":
        layer = LayerCost("16x1", 100.0, (0.05, 0.3, 0.6), (10.0, 40.0, 70.0))
        network, layers = network_of(model_of()), {"deep.0": layer, "deep.2": layer}
        costs = CostTable("x", "avx2", 1, 64, ((64, 24), (64, 2)), "float32", "float32", network, 20.0, layers)
        budget = Budget(unit, 100.0)
    method = method_of(budget=budget, costs=costs, scope="cost" if costs else "global")
    stream.learn(method, clicks(windows=2), Click(), ONLINE)
    if unit == "macs":
        assert method.pruner.macs[1] / method.pruner.macs[0] == pytest.approx(0.5, abs=0.01)
    if unit == "latency_us":
        assert method.pruner.predicted_us[1] == pytest.approx(budget.number, rel=0.02)
    if unit == "bytes":
        layers = method.pruner.layers().values()
        stored = sum(len(layer.values) * (layer.values[0].numel() * 4 + 4) for layer in layers)
        assert stored / sum(4 * layer.num_weights for layer in layers) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"budget": Budget("bytes", 10.0)}, r"bytes=10 cannot be reached: one unit of each layer stays"),
        ({"budget": 0.99, "floor": 0.3}, "cannot be reached"),
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"imitation": 2.0}, "imitation in"),
        ({"criterion": "guess"}, "criterion of fisher, taylor"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_learnt(options, message):
    model = model_of()
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=message):
        method_of(model, **options)
    assert same(before, model)


def test_it_needs_a_plain_full_model_and_an_optimizer():
    with pytest.raises(TypeError, match=r"expected Plain\(model, goal\), got Distiller"):
        D2S(Distiller(model_of(), model_of(), (), (), goal=Click(), alpha=0.5, beta=0.0), 0.5)
    method = method_of()
    method.loss(*next(next(iter(clicks())).batches(100)))
    with pytest.raises(RuntimeError, match=r"call attach\(optimizer\) before training"):
        method.after_boundary(1)
    with pytest.raises(RuntimeError, match="no batch has been learnt"):
        method_of().after_boundary(1)


@pytest.mark.parametrize("options", [{}, {"criterion": "random"}, {"exchange": 0.3, "exchange_every": 3}])
def test_what_it_is_compared_with_prunes_once_and_resumes(options, tmp_path):
    def method():
        model = model_of()
        examples = next(iter(clicks())).examples(8)
        return OnlinePruned(Plain(model, Click()), 0.8, exclude=model.not_pruned, example_inputs=examples, **options)

    whole = method()
    history = stream.learn(whole, clicks(), Click(), ONLINE)
    assert [one["pruned"] for one in history] == [True, False, False, False, False]
    assert whole.pruner.removed_share == pytest.approx(0.8, abs=0.01)
    stream.learn(method(), clicks(windows=2), Click(), ONLINE, state=tmp_path / "state")
    resumed = method()
    again = stream.learn(resumed, clicks(), Click(), ONLINE, state=tmp_path / "state")
    assert untimed(again) == untimed(history) and same(whole.student, resumed.student)
    first = method()
    stream.learn(first, clicks(windows=1), Click(), ONLINE)
    moved = any(
        not torch.equal(a, b) for a, b in zip(first.pruner.masks().values(), whole.pruner.masks().values(), strict=True)
    )
    assert moved == bool(options.get("exchange"))


def test_the_copy_learns_what_the_full_model_says_where_it_is_to():
    method = method_of(imitation=1.0)
    history = stream.learn(method, clicks(windows=3), Click(), ONLINE)
    assert history[1]["kd"] > 0
    pair = next(next(iter(clicks())).batches(100))
    before = method.serving_student.train()(*pair[0]).detach()
    optimizer = torch.optim.SGD(method.student.parameters(), lr=0.05)
    method.attach(optimizer)
    said = method.student(*pair[0]).detach()
    for _ in range(20):  # with labels that say the opposite
        method.loss(pair[0], (said < 0).float())
        copied = method._copy_loss(method.serving_student, pair[0], (said < 0).float(), said)[0]
        copied.backward()
        method.after_step()
    after = method.serving_student(*pair[0]).detach()
    assert (after - said).square().mean() < 0.8 * (before - said).square().mean()


def test_an_output_that_is_no_tensor_is_refused():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden, self.head = nn.Linear(4, 32), nn.Linear(32, 1)

        def forward(self, x):
            return self.head(self.hidden(x)).squeeze(1), x

    x = torch.randn(8, 4)
    with pytest.raises(TypeError, match="D2S: the goal takes one tensor, but the model returns a tuple of 2"):
        D2S(Plain(Two(), Click()), 0.5, exclude=["head"], example_inputs=(x,)).loss((x,), torch.ones(8))
    named = D2S(Plain(Two(), Click(), output=0), 0.5, exclude=["head"], example_inputs=(x,))
    assert torch.isfinite(named.loss((x,), torch.ones(8)).total)


def test_mistakes_in_the_loop_are_named():
    method = method_of()
    x, target = torch.zeros(8, 24), torch.zeros(8)
    with pytest.raises(TypeError, match=r"D2S\.loss: inputs must be a tuple, got Tensor; pass \(x,\)"):
        method.loss(x, target)
    method.attach(torch.optim.SGD(method.student.parameters(), lr=0.1))
    batch = next(next(iter(clicks())).batches(100))
    method.loss(*batch)
    method.after_boundary(1)
    with pytest.raises(RuntimeError, match="no batch has been learnt since the last one"):
        method.after_boundary(2)  # no copy is due
    method.loss(*batch)
    with torch.no_grad():
        method.student.deep[0].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"D2S\.after_boundary: expected finite .* NaN or infinity in deep\.0\.weight"):
        method.after_boundary(3)
