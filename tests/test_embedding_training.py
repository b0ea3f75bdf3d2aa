"""Training of packed tables: gradients of the rows of a batch alone, and the optimizers that take them."""

import copy
import pickle

import pytest
import torch
from torch import nn

from sparsekd import ops, optim
from sparsekd.nn import SparseEmbedding, SparseEmbeddingBag

from .test_embedding import layer_of

DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def sparse_pair(rows=90, dim=37, dtype=torch.float32, kind=SparseEmbedding, **options):
    """A layer with sparse gradients, and one with dense ones."""
    layer, _, mask = layer_of(rows, dim, dtype, kind, **options)
    other = copy.deepcopy(layer)
    layer.sparse = True
    return layer, other, mask


@pytest.mark.parametrize("padding_idx", [None, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "dim"), [(5, 1), (90, 37), (64, 64), (70, 300)])
def test_a_sparse_gradient_is_the_dense_one(rows, dim, dtype, padding_idx):
    layer, other, _ = sparse_pair(rows, dim, dtype, padding_idx=padding_idx)
    ids = torch.randint(rows, (3, 40))
    grad = torch.randn(3, 40, dim).to(dtype)
    out = layer(ids)
    assert torch.equal(out, other(ids))
    out.backward(grad)
    other(ids).backward(grad)
    got = layer.values.grad
    assert got.is_sparse and got.dtype == dtype
    assert bool((got._indices()[0].diff() > 0).all())
    error = 2**-7 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(got.to_dense(), other.values.grad, rtol=error, atol=error)
    touched = layer.mask()[ids.unique()].sum() - (0 if padding_idx is None else layer.mask()[4].sum())
    assert got._nnz() == touched or padding_idx is not None


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding_idx", [None, 4])
def test_sparse_gradients_of_bags(mode, padding_idx):
    layer, other, _ = sparse_pair(kind=SparseEmbeddingBag, mode=mode, padding_idx=padding_idx)
    ids, offsets = torch.randint(90, (50,)), torch.tensor([0, 7, 7, 30])
    weights = [torch.rand(50, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2)]
    for bag, weight in zip((layer, other), weights, strict=True):
        out = bag(ids, offsets, weight if mode == "sum" else None)
        out.backward(torch.ones(4, 37).cumsum(1))
    assert layer.values.grad.is_sparse
    torch.testing.assert_close(layer.values.grad.to_dense(), other.values.grad)
    if mode == "sum":
        torch.testing.assert_close(weights[0].grad, weights[1].grad)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("kind", [SparseEmbedding, SparseEmbeddingBag])
def test_only_ids_that_learn_have_a_gradient(kind, sparse):
    layer, other, _ = sparse_pair(kind=kind)
    layer.sparse = sparse
    ids = torch.randint(90, (6, 5))
    learns = torch.rand(6, 5) < 0.4
    rows = torch.randn(6, 5, 37) if kind is SparseEmbedding else torch.randn(6, 37)
    layer(ids, learns=learns).backward(rows)
    every = rows if kind is SparseEmbedding else rows[:, None].expand(6, 5, 37) / 5
    other_rows = ops.embedding(ids[learns], other.table, 37)
    other_rows.backward(every[learns])
    got = layer.values.grad.to_dense() if sparse else layer.values.grad
    torch.testing.assert_close(got, other.values.grad)


def test_a_batch_without_ids_and_two_backward_passes():
    layer, other, _ = sparse_pair()
    layer(torch.zeros(0, dtype=torch.int64)).sum().backward()
    assert layer.values.grad._nnz() == 0
    for ids in (torch.arange(9), torch.arange(5, 20)):
        layer(ids).sum().backward()
        other(ids).sum().backward()
    assert torch.equal(layer.values.grad.to_dense(), other.values.grad)


@pytest.mark.parametrize("threads", [1, 2])
def test_sparse_gradients_do_not_depend_on_threads(threads):
    layer, _, _ = sparse_pair(300, 24)
    ids, grad = torch.randint(300, (5000,)), torch.randn(5000, 24)
    before, results = torch.get_num_threads(), []
    try:
        for number in (1, threads, threads):
            torch.set_num_threads(number)
            layer.values.grad = None
            layer(ids).backward(grad)
            results.append(layer.values.grad._values())
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], result) for result in results[1:])


OPTIMIZERS = {
    "sgd": (lambda t: optim.SparseSGD(t, 0.1, 0.01), lambda p: torch.optim.SGD(p, 0.1, weight_decay=0.01)),
    "adagrad": (
        lambda t: optim.SparseAdagrad(t, 0.1, 0.01, 0.5),
        lambda p: torch.optim.Adagrad(p, 0.1, weight_decay=0.01, initial_accumulator_value=0.5),
    ),
    "adam": (
        lambda t: optim.SparseAdam(t, 0.1, weight_decay=0.01),
        lambda p: torch.optim.Adam(p, 0.1, weight_decay=0.01),
    ),
}


def train(layer, optimizer, batches, target):
    for ids in batches:
        optimizer.zero_grad()
        (layer(ids) - target[ids]).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("rows", [70, 3000])
def test_where_every_row_is_in_every_step_it_is_the_optimizer_of_torch(name, dtype, rows):
    layer, other, _ = sparse_pair(rows, 20, dtype)
    ours, theirs = OPTIMIZERS[name]
    batches, target = [torch.randperm(rows) for _ in range(5)], torch.randn(rows, 20, dtype=dtype)
    train(layer, ours(layer), batches, target)
    train(other, theirs(other.parameters()), batches, target)
    torch.testing.assert_close(layer.values, other.values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_row_moves_as_if_the_steps_without_it_had_not_been(name):
    """Two halves of a table that take turns are two tables of their own, under torch's optimizers."""
    rows, dim = 80, 12
    layer, other, _ = sparse_pair(rows, dim)
    ours, theirs = OPTIMIZERS[name]
    target = torch.randn(rows, dim)
    halves = torch.arange(0, rows, 2), torch.arange(1, rows, 2)
    optimizer = ours(layer)
    train(layer, optimizer, [halves[0], halves[0], halves[1], halves[0]], target)
    for ids, steps in zip(halves, (3, 1), strict=True):
        alone = SparseEmbedding.from_dense(
            nn.Embedding(len(ids), dim, _weight=other.rows()[ids]), mask=other.mask()[ids]
        )
        train(alone, theirs(alone.parameters()), [torch.arange(len(ids))] * steps, target[ids])
        torch.testing.assert_close(layer(ids), alone.rows(), rtol=1e-4, atol=1e-5)


def test_what_a_batch_does_not_touch_keeps_its_bits():
    layer, _, _ = sparse_pair()
    for optimizer in (optim.SparseSGD(layer, 0.1, 0.1), optim.SparseAdagrad(layer), optim.SparseAdam(layer)):
        train(layer, optimizer, [torch.arange(90)], torch.zeros(90, 37))
        before, state = layer.rows(), copy.deepcopy(optimizer.state[layer.values])
        train(layer, optimizer, [torch.tensor([3, 70])], torch.zeros(90, 37))
        same = (layer.rows() == before).all(1)
        assert same.sum() >= 88 and not same[3] and not same[70]
        for key, value in state.items():
            if key not in optimizer.state_of_rows:
                changed = (optimizer.state[layer.values][key] != value).sum()
                assert 0 < changed <= layer.mask()[[3, 70]].sum()


def test_adagrad_by_row_is_written_by_hand():
    mask = torch.tensor([[1, 0, 1], [0, 1, 0]]).bool()
    layer = SparseEmbedding.from_dense(nn.Embedding(2, 3, sparse=True, _weight=torch.ones(2, 3)), mask=mask)
    optimizer = optim.SparseAdagrad(layer, 0.5, by_row=True, eps=0.0)
    layer(torch.tensor([0])).backward(torch.tensor([[3.0, 9.0, 4.0]]))
    optimizer.step()
    rate = 0.5 / 12.5**0.5
    torch.testing.assert_close(layer.values.data, torch.tensor([1 - 3 * rate, 1 - 4 * rate, 1.0]))
    assert optimizer.state[layer.values]["row_sum"].tolist() == [12.5, 0.0]


def test_bias_is_corrected_by_how_often_a_row_occurred_up_to_its_highest_count():
    layer = SparseEmbedding(3, 4, sparse=True)
    optimizer = optim.SparseAdam(layer, 0.1)
    for ids in ([0, 1], [0], [0]):
        optimizer.zero_grad()
        layer(torch.tensor(ids)).sum().backward()
        optimizer.step()
    state = optimizer.state[layer.values]
    assert state["occurred"].tolist() == [3, 1, 0] and state["occurred"].dtype == torch.int16
    state["occurred"][2] = -2  # the bits of 65534
    for wanted in (-1, -1):
        before = layer.values.detach().clone()
        optimizer.zero_grad()
        layer(torch.tensor([2])).sum().backward()
        optimizer.step()
        assert state["occurred"][2] == wanted
    mean, square = state["exp_avg"][8:], state["exp_avg_sq"][8:]
    torch.testing.assert_close(layer.values[8:], before[8:] - 0.1 * mean / (square.sqrt() + 1e-8))


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_states_are_saved_and_go_on(dtype, by_row):
    batches, target = [torch.randint(90, (30,)).unique() for _ in range(8)], torch.randn(90, 37)
    for make in (lambda t: optim.SparseAdam(t, 0.05), lambda t: optim.SparseAdagrad(t, 0.05, by_row=by_row)):
        layer, _, _ = sparse_pair(dtype=dtype)
        optimizer = make(layer)
        train(layer, optimizer, batches[:4], target)
        again = copy.deepcopy(layer)
        resumed = make(again)
        resumed.load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))
        both = pickle.loads(pickle.dumps((layer, optimizer)))
        for one, its in ((layer, optimizer), (again, resumed), both):
            train(one, its, batches[4:], target)
        for one, its in ((again, resumed), both):
            assert torch.equal(one.values, layer.values)
            for key, value in optimizer.state[layer.values].items():
                assert torch.equal(its.state[one.values][key], value)
                assert its.state[one.values][key].dtype == value.dtype


def test_optimizers_of_torch_take_sparse_gradients_too():
    layer, other, _ = sparse_pair()
    ids = torch.randint(90, (30,)).unique()
    for one in (layer, other):
        train(one, torch.optim.SGD(one.parameters(), lr=0.1), [ids], torch.zeros(90, 37))
    torch.testing.assert_close(layer.values, other.values)
    train(layer, torch.optim.SparseAdam(list(layer.parameters())), [ids], torch.zeros(90, 37))


@pytest.mark.parametrize("name", ["sgd", "adagrad", "adagrad_rows", "adam"])
def test_kernels_of_optimizers_are_the_references_and_pass_opcheck(name):
    from sparsekd.ops import embedding_update as references

    layer, _, _ = layer_of(150, 70)
    n, index = layer.values.shape[0], layer.table[1:]
    places = torch.randperm(n)[: n // 2].sort().values
    grad = torch.randn(places.shape[0])
    occurred = torch.randint(0, 2**15, (150,), dtype=torch.int16)
    state = {
        "sgd": [],
        "adagrad": [torch.rand(n)],
        "adagrad_rows": [torch.rand(150), *index],
        "adam": [torch.randn(n), torch.rand(n), occurred, *index],
    }[name]
    numbers = {"sgd": [0.1, 0.01], "adagrad": [0.1, 1e-3, 0.01], "adagrad_rows": [0.1, 1e-3, 0.01]}
    args = [*state, places, grad, *numbers.get(name, [0.1, 0.9, 0.99, 1e-3, 0.01])]
    op, values = getattr(torch.ops.sparsekd, f"embedding_{name}_"), layer.values.detach()
    want, got = (copy.deepcopy([values, *args]) for _ in range(2))
    getattr(references, f"embedding_{name}_reference")(*want)
    op(*got)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    torch.library.opcheck(op, (values, *args))
    for wrong in (places.flip(0), places + n):
        args[len(state)] = wrong
        with pytest.raises(IndexError, match="must ascend in"):
            op(values, *args)


def test_opcheck_of_the_gradient_and_what_compiles(fresh_compiler):
    layer, other, _ = sparse_pair()
    rows, begin = torch.tensor([2, 5]), layer.mask()[[2, 5]].sum(1).cumsum(0)
    begin = torch.cat([begin.new_zeros(1), begin])
    args = (*layer.table[1:], rows, torch.tensor([0, 2, 3]), torch.tensor([1, 2, 0]), None, torch.rand(3), begin)
    op = torch.ops.sparsekd.embedding_rows_grad
    torch.library.opcheck(op, (torch.randn(3, 37), *args, int(begin[-1])))
    ids = torch.randint(90, (7,))
    compiled = torch.compile(layer, backend="aot_eager")  # the graph breaks around the lookup
    compiled(ids).sum().backward()
    other(ids).sum().backward()
    assert torch.equal(layer.values.grad.to_dense(), other.values.grad)
    assert torch.equal(torch.export.export(layer, (ids,)).module()(ids), other(ids))


def test_bad_input_is_refused_with_the_way_out():
    layer, dense, _ = sparse_pair()
    ids = torch.tensor([1, 2])
    model = nn.ModuleDict({"table": layer, "other": dense, "head": nn.Linear(37, 1)})
    assert len(list(optim.other_parameters(model))) == 3
    adam = optim.SparseAdam(model)
    assert adam.param_groups[0]["params"] == [layer.values]
    cases = [
        (ValueError, "with sparse=True", lambda: optim.SparseSGD(nn.Linear(2, 2), 0.1)),
        (TypeError, "with sparse=True", lambda: optim.SparseSGD([dense], 0.1)),
        (ValueError, "lr must be", lambda: optim.SparseSGD(layer, -1.0)),
        (ValueError, "betas", lambda: optim.SparseAdam(layer, betas=(0.9, 1.0))),
        (ValueError, r"one bool for each id, of shape \(2,\)", lambda: layer(ids, learns=torch.ones(3).bool())),
        (IndexError, "must lie in", lambda: layer(ids + 89)),
    ]
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()
    layer.sparse = False
    layer(ids).sum().backward()
    with pytest.raises(TypeError, match="expected a sparse gradient"):
        adam.step()
