"""A layer's call reaches the CPU kernels without torch's dispatcher, unless somebody wants to see the op."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

import sparsekd
from sparsekd.backends import cpu
from sparsekd.nn import SparseEmbedding, SparseEmbeddingBag
from sparsekd.ops import _schema
from sparsekd.ops.embedding import pack_mask

pytestmark = pytest.mark.skipif(cpu.native is None, reason="no compiled kernels")

LAYERS = {
    "linear": (nn.Linear(24, 32), (5, 24)),
    "conv2d": (nn.Conv2d(8, 32, 3, padding=1), (2, 8, 6, 6)),
}


@pytest.fixture(params=LAYERS)
def layer(request):
    dense, shape = LAYERS[request.param]
    return (
        request.param,
        type(sparsekd.sparsify(nn.Sequential(dense), density=0.5)[0]).from_dense(dense, density=0.5),
        torch.randn(shape),
    )


@pytest.fixture
def direct(monkeypatch):
    """The ops that were reached without the dispatcher."""
    reached = []

    def counted(name, op):
        def run(*args):
            reached.append(name)
            return op(*args)

        return run

    for name, op in list(_schema.DIRECT.items()):
        monkeypatch.setitem(_schema.DIRECT, name, counted(name, op))
    return reached


def by_the_dispatcher(monkeypatch):
    monkeypatch.setattr(_schema, "DIRECT", {})


def test_a_call_is_direct_with_and_without_gradients(layer, direct):
    name, module, x = layer
    with torch.no_grad():
        module(x)
    assert direct == [name]
    direct.clear()
    module(x.requires_grad_()).sum().backward()
    assert direct == [name, f"{name}_grad_input", f"{name}_grad_values"]


@pytest.mark.parametrize(("sparse", "gradient"), [(False, "embedding_grad"), (True, "embedding_rows_grad")])
def test_tables_are_looked_up_and_learn_without_the_dispatcher(direct, sparse, gradient):
    ids, offsets = torch.tensor([1, 2, 2, 7]), torch.tensor([0, 3])
    layers = [kind(50, 8, density=0.5, sparse=sparse) for kind in (SparseEmbedding, SparseEmbeddingBag)]
    for layer, arguments, lookup in (
        (layers[0], (ids,), ["embedding"]),
        (layers[1], (ids, offsets), ["embedding_bag_scale", "embedding_bag"]),
    ):
        with torch.no_grad():
            layer(*arguments)
        assert direct == lookup
        layer(*arguments).sum().backward()
        assert direct == [*lookup, *lookup, gradient]
        direct.clear()


def exchange_entries(table):
    table.rekeep_(pack_mask(~table.mask() | (torch.arange(8) == 0)))


def other_table(table):
    table.load_state_dict(type(table)(50, 8, density=0.75).state_dict())


TABLE_CHANGES = {
    "nothing": lambda table: None,
    "values in place": lambda table: table.values.data.mul_(2),
    "data of values": lambda table: setattr(table.values, "data", table.values.data * 2),
    "other values": lambda table: setattr(table, "values", nn.Parameter(table.values.detach() + 1)),
    "other entries": exchange_entries,
    "state": other_table,
    "double": lambda table: table.double(),
    "bfloat16": lambda table: table.bfloat16(),
    "float16": lambda table: table.half(),
}


@pytest.mark.parametrize("change", TABLE_CHANGES)
@pytest.mark.parametrize("mode", [None, "sum", "mean", "max"])
def test_a_lookup_like_the_last_one_sees_what_has_changed(mode, change, monkeypatch):
    table = SparseEmbedding(50, 8, density=0.5) if mode is None else SparseEmbeddingBag(50, 8, mode, density=0.5)
    ids = torch.tensor([[1, 2, 2], [7, 0, 49]])
    with torch.no_grad():
        before = table(ids)
        with monkeypatch.context() as patch:
            if mode != "max":  # which is torch's own over the rows
                patch.setattr(type(table), "table", None)  # the second call asks for nothing
            assert torch.equal(table(ids), before)
        TABLE_CHANGES[change](table)
        got, again, want = table(ids), table(ids), table.to_dense()(ids)
        assert torch.equal(got, again) and got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=0.02 if got.itemsize == 2 else 1e-5, atol=1e-5)
        for others in (ids.int(), ids.flip(0), ids[:, ::2], ids.T, ids[:, :1]):
            torch.testing.assert_close(table(others), table.to_dense()(others), rtol=0.02, atol=1e-5)
        with pytest.raises(IndexError):
            table(ids + 1)
        with pytest.raises(TypeError):
            table(ids.float())
        with Seen() as seen:
            table(ids)
        assert any("sparsekd.embedding" in name for name in seen.names)
        copied = copy.deepcopy(table)
        copied.values.data.zero_()
        assert torch.equal(table(ids), got) and not copied(ids).any()
        replaced = {"values": torch.zeros_like(table.values)}
        assert not torch.func.functional_call(table, replaced, (ids,)).any()
        assert torch.equal(table(ids), got)
    assert table(ids).requires_grad


def test_bags_like_the_last_ones_have_their_offsets_weights_and_padding():
    table = SparseEmbeddingBag(50, 8, "sum", padding_idx=2, density=0.5)
    dense, ids, weights = table.to_dense(), torch.tensor([1, 2, 2, 7, 0, 49]), torch.rand(6)
    with torch.no_grad():
        for offsets in ([0], [0, 3], [0, 0, 6], [0, 2, 5]):
            for given in (None, weights, -weights):
                for _ in range(2):
                    got = table(ids, torch.tensor(offsets), given)
                    torch.testing.assert_close(got, dense(ids, torch.tensor(offsets), given))


def test_a_table_whose_values_are_computed_is_no_call_like_the_last_one():
    table, ids = SparseEmbedding(50, 8, density=0.5), torch.tensor([1, 2, 7])
    with torch.no_grad():
        want = table(ids)
        prune.identity(table, "values")  # makes values_orig the parameter
        assert all(torch.equal(table(ids), want) for _ in range(3))


def test_a_table_lets_go_of_what_it_no_longer_has():
    table = SparseEmbedding(50, 8, density=0.5)
    for change in (exchange_entries, other_table, lambda table: table.to("meta")):
        with torch.no_grad():
            table(torch.tensor([1]))
        old = weakref.ref(table.counts)
        change(table)
        gc.collect()
        assert old() is None


def exchange_data(layer):
    layer.values.data = layer.values.data * 2


def drop_blocks(layer):
    layer.keep_(torch.arange(len(layer.col_idx)) % 2 == 0)


def other_bias(layer):
    layer.bias = nn.Parameter(layer.bias.detach() + 1)


def other_state(layer):
    other = type(layer).from_dense(layer.to_dense(), density=0.25)
    layer.load_state_dict(other.state_dict())


def dilate(layer):
    if hasattr(layer, "dilation"):
        layer.padding = layer.dilation = (2, 2)


CHANGES = {
    "nothing": lambda layer: None,
    "values in place": lambda layer: layer.values.data.mul_(2),
    "data of values": exchange_data,
    "fewer blocks": drop_blocks,
    "bias": other_bias,
    "no bias": lambda layer: setattr(layer, "bias", None),
    "state": other_state,
    "geometry": dilate,
    "double": lambda layer: layer.double(),
    "bfloat16": lambda layer: layer.bfloat16(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_call_like_the_last_one_sees_what_has_changed(layer, change, direct):
    name, module, x = layer
    with torch.no_grad():
        assert torch.equal(module(x), module(x))
        assert direct == [name]  # the second went straight to the kernel
        CHANGES[change](module)
        x = x.to(module.values.dtype)
        got, again = module(x), module(x)
        assert torch.equal(got, again)
        want = type(module.to_dense()).forward(module.to_dense(), x)
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=0.02 if got.dtype == torch.bfloat16 else 1e-5, atol=1e-5)


def test_a_call_like_the_last_one_sees_another_input(layer, direct):
    name, module, x = layer
    dense = module.to_dense()
    others = [torch.randn_like(x), torch.cat([x, x]), x.double().float()[::2], x.flip(0)]
    if name == "conv2d":
        others += [x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3), x[0]]
    with torch.no_grad():
        for one in (x, *others, x):
            for _ in range(2):
                torch.testing.assert_close(module(one), dense(one), rtol=1e-5, atol=1e-5)
        with pytest.raises((TypeError, ValueError)):
            module(x.double())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert module(x).dtype == torch.bfloat16
    assert module(x).requires_grad


def test_copies_and_replaced_parameters_are_not_the_last_call(layer):
    _, module, x = layer
    with torch.no_grad():
        want = module(x)
        for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            copied.values.data.zero_()
            assert torch.equal(module(x), want)
            assert not torch.equal(copied(x), want)
        replaced = {"values": torch.zeros_like(module.values)}
        assert not torch.equal(torch.func.functional_call(module, replaced, (x,)), want)
        assert torch.equal(module(x), want)


def test_both_ways_compute_the_same(layer, monkeypatch):
    _, module, x = layer
    results = []
    for direct in (True, False):
        if not direct:
            by_the_dispatcher(monkeypatch)
        x = x.detach().requires_grad_()
        module.zero_grad()
        y = module(x)
        (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        grad.square().sum().backward()  # through the gradient too
        results.append([y, grad, x.grad, *(p.grad for p in module.parameters())])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_modes_and_profilers_see_the_op(layer, direct):
    name, module, x = layer
    with torch.no_grad(), Seen() as seen:
        module(x)
    assert f"sparsekd.{name}.default" in seen.names
    with torch.no_grad(), profile() as profiled:
        module(x)
    assert f"sparsekd::{name}" in {event.key for event in profiled.key_averages()}
    assert not direct


def test_subclasses_and_transforms_go_by_the_dispatcher(layer, direct):
    _, module, x = layer

    class Mine(torch.Tensor):
        pass

    with torch.no_grad():
        assert type(module(x.as_subclass(Mine))) is Mine
    torch.func.grad(lambda x: module(x).sum())(x)
    assert not direct
