"""Single entries of embedding tables that go and come back: the budget, the rows, the bits, and the optimizers."""

import copy

import pytest
import torch

from sparsekd import optim
from sparsekd.nn import SparseEmbedding
from sparsekd.ops import embedding_update as references
from sparsekd.ops.embedding import count_kept, pack_mask, row_index
from sparsekd.pruning import drop_entries, exchange_entries, grow_entries


def table_of(rows=130, dim=37, density=0.3, **options):
    return SparseEmbedding(rows, dim, density=density, sparse=True, **options)


def check_table(table):
    """What holds whatever happened."""
    base, counts = row_index(table.kept)
    assert torch.equal(table.base, base) and torch.equal(table.counts, counts)
    assert table.values.shape == (int(count_kept(table.kept).sum()),)
    assert bool((count_kept(table.kept) >= 1).all())


def exchanged_by_sort(table, moves, rows, scores):
    """The masks before and after, by a dense stable sort."""
    dense, before = table.rows(), table.mask()
    magnitude = dense.abs()
    protected = torch.where(before, magnitude, -1.0).argmax(1, keepdim=True)
    weak = torch.where(before, magnitude, float("inf")).scatter(1, protected, float("inf")).flatten()
    strong = torch.zeros(before.shape).index_copy(0, rows, scores.abs()).masked_fill(before, 0)
    order = torch.full(before.shape, 10**9).index_copy(0, rows, torch.arange(scores.numel()).view(scores.shape))
    moves = min(moves, int((weak < float("inf")).sum()), int((strong > 0).sum()))
    after = before.clone()
    after.view(-1)[weak.sort(stable=True).indices[:moves]] = False
    by_place = order.flatten().sort(stable=True).indices
    best = by_place[strong.flatten()[by_place].sort(descending=True, stable=True).indices[:moves]]
    after.view(-1)[best] = True
    return before, after, moves


@pytest.mark.parametrize("integers", [False, True], ids=["any", "ties"])
@pytest.mark.parametrize(("rows", "dim"), [(1, 4), (64, 16), (130, 37), (300, 70), (20, 300)])
@pytest.mark.parametrize("moves", [0, 1, 17, 10**6])
def test_the_weakest_go_the_best_come_back(rows, dim, moves, integers):
    table = table_of(rows, dim)
    if integers:
        table.values.data.round_()
    some = torch.randperm(rows)[: max(1, rows // 2)]
    scores = torch.randn(len(some), dim)
    scores = scores.round() if integers else scores
    old, budget = table.rows(), table.values.shape[0]
    before, after, number = exchanged_by_sort(table, moves, some, scores)
    parameter = table.values
    assert exchange_entries(table, moves, some, scores) == number
    check_table(table)
    assert table.values is parameter and table.values.shape[0] == budget
    assert torch.equal(table.mask(), after)
    both = before & after
    assert torch.equal(table.rows()[both], old[both]) and not table.rows()[~both].any()


def test_only_named_rows_grow_and_never_the_padding_or_what_has_no_score():
    table = table_of(padding_idx=5)
    before = table.mask()
    rows, scores = torch.tensor([5, 40, 2]), torch.ones(3, 37)
    scores[2] = 0
    number = exchange_entries(table, 10**6, rows, scores)
    grown = table.mask() & ~before
    assert number == int((~before[40]).sum()) == int(grown.sum()) and grown[40].sum() == number


OPTIMIZERS = [
    optim.SparseAdam,
    lambda t: optim.SparseAdagrad(t, initial_accumulator_value=0.5),
    lambda t: optim.SparseAdagrad(t, by_row=True),
    lambda t: torch.optim.SparseAdam(list(t.parameters())),
    lambda t: torch.optim.Adagrad(t.parameters(), initial_accumulator_value=0.5),
]


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_optimizers_follow_and_training_goes_on(make):
    table = table_of()
    optimizer, target = make(table), torch.randn(130, 37)
    for _ in range(5):
        ids = torch.randint(130, (60,)).unique()
        optimizer.zero_grad()
        (table(ids) - target[ids]).square().sum().backward()
        optimizer.step()
        budget, before = table.values.shape[0], table.mask()
        state = {key: value.clone() for key, value in optimizer.state[table.values].items() if torch.is_tensor(value)}
        exchange_entries(table, 100, ids, torch.randn(len(ids), 37), [optimizer])
        check_table(table)
        after = table.mask()
        assert table.values.shape[0] == budget and int((before & ~after).sum()) == min(
            100, int((after & ~before).sum())
        )
        for key, old in state.items():
            new = optimizer.state[table.values][key]
            if old.dim() == 0 or key in getattr(optimizer, "state_of_rows", ()):
                assert torch.equal(new, old)
                continue
            assert torch.equal(new[before[after]], old[after[before]])
            fresh = 0.5 if key == "sum" else 0.0
            assert bool((new[~before[after]] == fresh).all())


def test_entries_go_and_come_back_alone():
    table = table_of()
    optimizer, budget = optim.SparseAdam(table), table.values.shape[0]
    table(torch.arange(130)).sum().backward()
    optimizer.step()
    drop_entries(table, 300, [optimizer])
    check_table(table)
    assert table.values.shape[0] == budget - 300 == optimizer.state[table.values]["exp_avg"].shape[0]
    assert grow_entries(table, 200, torch.arange(130), torch.rand(130, 37) + 0.1, [optimizer]) == 200
    check_table(table)
    assert table.values.shape[0] == budget - 100 == optimizer.state[table.values]["exp_avg"].shape[0]
    table(torch.arange(130)).sum().backward()
    optimizer.step()


def test_given_numbers_say_what_is_weakest():
    table = table_of(10, 8, density=0.5)
    before = table.mask()
    weakest = torch.ones(40)
    weakest[:7] = torch.arange(7) / 10
    drop_entries(table, 3, weakest=-weakest)
    gone = (before & ~table.mask())[before]
    assert gone.nonzero().flatten().tolist() == [0, 1, 2]


def test_nothing_has_changed_where_it_raises():
    table = table_of()
    optimizer = optim.SparseAdam(table)
    rows, scores, other = torch.arange(4), torch.randn(4, 37), torch.optim.Adafactor(table.parameters())
    table(rows).sum().backward()
    optimizer.step()
    other.state[table.values]["row_var"] = torch.zeros(3)
    state = copy.deepcopy(table.state_dict())
    nan = scores.clone().fill_(float("nan"))
    cases = [
        (ValueError, "number of entries", lambda: exchange_entries(table, -1, rows, scores)),
        (ValueError, r"float scores \[m, 37\]", lambda: exchange_entries(table, 1, rows, scores[:, 1:])),
        (ValueError, r"int64 rows \[m\]", lambda: exchange_entries(table, 1, rows.int(), scores)),
        (ValueError, "must lie in", lambda: exchange_entries(table, 1, rows + 127, scores)),
        (ValueError, "named once", lambda: exchange_entries(table, 1, rows * 0, scores)),
        (ValueError, "finite scores", lambda: exchange_entries(table, 1, rows, nan)),
        (ValueError, "one for each kept", lambda: exchange_entries(table, 1, rows, scores, weakest=torch.ones(3))),
        (ValueError, "one of every row stays", lambda: drop_entries(table, 10**6)),
        (ValueError, "beyond the 37", lambda: table.rekeep_(table.kept | 1 << 40)),
        (ValueError, "rekeep_: expected int64", lambda: table.rekeep_(table.kept[1:])),
        (TypeError, "row_var", lambda: exchange_entries(table, 1, rows, scores, [other])),
    ]
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()
    assert all(torch.equal(value, state[name]) for name, value in table.state_dict().items())
    table.values.data[3] = float("inf")
    with pytest.raises(ValueError, match="before the divergence"):
        exchange_entries(table, 1, rows, scores)


@pytest.mark.parametrize(("rows", "dim"), [(1, 1), (130, 37), (64, 64), (70, 300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int8], ids=str)
def test_kernels_are_the_references(rows, dim, dtype):
    before, after = (torch.rand(rows, dim) < share for share in (0.4, 0.5))
    before[rows // 2] = False
    before[-1] = after[0] = True
    kept, new = pack_mask(before), pack_mask(after)
    index, other = (kept, *row_index(kept)), (new, *row_index(new))
    values = (torch.randn(int(before.sum())) * 9).to(dtype)
    ops = torch.ops.sparsekd
    args = (values, *index, *other, int(after.sum()), 2.0)
    assert torch.equal(ops.embedding_repack(*args), references.embedding_repack_reference(*args))
    stays = torch.rand(values.shape) < 0.5
    assert torch.equal(ops.embedding_thin(*index, stays), references.embedding_thin_reference(*index, stays))
    if dtype.is_floating_point:
        got = ops.embedding_magnitudes(values, *index)
        assert torch.equal(got, references.embedding_magnitudes_reference(values, *index))
    if dtype == torch.float32:
        torch.library.opcheck(ops.embedding_repack, args)
        torch.library.opcheck(ops.embedding_thin, (*index, stays))
        torch.library.opcheck(ops.embedding_magnitudes, (values, *index))
