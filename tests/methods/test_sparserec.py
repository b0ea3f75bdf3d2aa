"""SparseRec: budgets hold after every step, masks come from the factorisation, growth by summed gradients."""

import math
import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch

from sparsekd import models
from sparsekd.distill import Plain
from sparsekd.goals import Ranking
from sparsekd.methods import SparseRec
from sparsekd.methods.nmf import _update, nmf
from sparsekd.methods.tables import bytes_of, largest
from sparsekd.nn import SparseEmbedding, SparseEmbeddingBag

from .made_up import CHOSEN, PART, SIZES, epoch, learner

STEPS = 60


def sparserec(**options):
    defaults = {"interactions": CHOSEN, "steps": STEPS, "every": 4, "exchanged": 0.3}
    return learner(SparseRec, **{**defaults, **options})


@pytest.mark.parametrize("sweeps", [1, 25])
def test_nmf_agrees_with_scikit_learn(sweeps):
    decomposition = pytest.importorskip("sklearn.decomposition")
    users, items = CHOSEN
    dense = np.zeros((24, 30), np.float32)
    dense[users, items] = 1
    generator = np.random.default_rng(0)
    w, h = (generator.random(shape, np.float32) for shape in ((24, 5), (30, 5)))
    theirs = decomposition.NMF(5, init="custom", solver="mu", max_iter=sweeps, tol=0)
    want = theirs.fit_transform(dense, W=w.copy(), H=np.ascontiguousarray(h.T))
    twice = torch.cat([users, users]), torch.cat([items, items])  # a pair counts once
    got = nmf(*twice, 24, 30, 5, sweeps=sweeps, start=(torch.from_numpy(w), torch.from_numpy(h)))
    torch.testing.assert_close(got[0], torch.from_numpy(want), rtol=2e-4, atol=1e-5)
    torch.testing.assert_close(got[1], torch.from_numpy(theirs.components_.T.copy()), rtol=2e-4, atol=1e-5)


def test_nmf_finds_the_two_tastes_from_its_own_start():
    w, h = nmf(*CHOSEN, 24, 30, 2, sweeps=60)
    assert bool((w >= 0).all()) and bool((h >= 0).all())
    taste = w.argmax(1)
    assert len(set(taste[:12].tolist())) == len(set(taste[12:].tolist())) == 1 and taste[0] != taste[12]


def test_masks_start_from_the_factors_of_length_one():
    model, method, _ = sparserec(dim=8, sweeps=10)
    w, h = nmf(*CHOSEN, 24, 30, 8, sweeps=10)
    want = largest([torch.nn.functional.normalize(factor) for factor in (w, h)], method.budget)
    assert torch.equal(model.users.mask(), want[0]) and torch.equal(model.items.mask(), want[1])
    assert method.num_kept == method.budget == round(0.25 * 54 * 8)
    for table, factor, mask in zip(method.tables, (w, h), want, strict=True):
        start = torch.nn.functional.normalize(factor)[mask]
        torch.testing.assert_close(table.values.detach(), 0.1 * start / start.square().mean().sqrt())
    normal = sparserec(dim=8, sweeps=10, values="normal")[0]
    assert torch.equal(normal.users.kept, model.users.kept) and bool((normal.users.values < 0).any())
    assert float(normal.users.values.detach().square().mean().sqrt()) == pytest.approx(0.1)


def test_largest_keeps_one_of_every_row_and_the_largest_others():
    scores = [torch.tensor([[0.1, 0.2], [5.0, 4.0]]), torch.tensor([[3.0, 0.0]])]
    masks = largest(scores, 4)
    assert [mask.tolist() for mask in masks] == [[[False, True], [True, True]], [[True, False]]]


def lightgcn(sizes, dim, **options):
    return models.LightGCN(sizes, CHOSEN, dim, **options)


@pytest.mark.parametrize("kind", [models.MF, models.NeuMF, lightgcn])
@pytest.mark.parametrize("options", [{}, {"sample": 0.5}, {"accumulate": "absolute"}, {"accumulate": "last"}])
def test_the_budget_holds_after_every_step_and_learning_goes_on(kind, options):
    model, method, optimizer = sparserec(kind=kind, **options)
    budget = method.budget
    masks = []

    def check():
        assert method.num_kept == budget
        assert all(int(table.mask().sum(1).min()) >= 1 for table in method.tables)
        for table in method.tables:
            state = optimizer.state[table.values]
            assert state["exp_avg"].shape == state["exp_avg_sq"].shape == table.values.shape
            assert torch.isfinite(table.values).all()
        masks.append(model.users.mask())

    first = epoch(method, optimizer, 0, check)
    for number in range(1, 4):
        last = epoch(method, optimizer, number, check)
    assert last < first
    changed = [number for number, (a, b) in enumerate(pairwise(masks), 2) if not torch.equal(a, b)]
    assert changed and all(step % 4 == 0 and step < 0.75 * STEPS for step in changed)


def test_training_that_goes_on_past_its_steps_is_warned_of_once():
    _, method, _ = sparserec()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        method.step = STEPS - 1
        method.after_step()
    with pytest.warns(UserWarning, match=f"step {STEPS + 1} of {STEPS}, .*; give steps= of the whole training"):
        method.after_step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        method.after_step()


def test_an_exchange_drops_the_smallest_and_brings_back_what_gradients_want():
    model, method, optimizer = sparserec(every=3, steps=100, init="random", exchanged=0.2)
    model.train()
    wanted = [torch.zeros(table.num_embeddings, 8) for table in method.tables]
    for number, (inputs, target) in enumerate(PART.batches(16, torch.Generator().manual_seed(0)), 1):
        dense = models.MF(SIZES, 8)
        for full, table in zip((dense.users, dense.items), method.tables, strict=True):
            full.weight.data.copy_(table.rows())
        Ranking().loss(dense(*inputs), target).backward()
        for total, full in zip(wanted, (dense.users, dense.items), strict=True):
            total += full.weight.grad
        optimizer.zero_grad()
        method.loss(inputs, target).total.backward()
        optimizer.step()
        if number == 3:
            break
        method.after_step()
    before = [table.rows() for table in method.tables]
    masks = [table.mask() for table in method.tables]
    method.after_step()
    moves = round(0.1 * (1 + math.cos(math.pi * 3 / 75)) * method.budget)
    absent = torch.cat([total[~mask].abs() for total, mask in zip(wanted, masks, strict=True)])
    threshold = absent.topk(moves).values[-1]
    gone = came = 0
    for table, total, mask, rows in zip(method.tables, wanted, masks, before, strict=True):
        now = table.mask()
        assert torch.equal(now & ~mask, (total.abs() >= threshold) & ~mask)
        assert bool((table.rows()[now & ~mask] == 0).all())
        assert torch.equal(table.rows()[now & mask], rows[now & mask])
        gone, came = gone + int((mask & ~now).sum()), came + int((now & ~mask).sum())
        state = optimizer.state[table.values]["exp_avg_sq"]
        assert bool((state[~mask[now]] == 0).all()) and bool((state[mask[now]] != 0).any())
    assert gone == came == moves
    left = list(zip(method.tables, masks, before, strict=True))
    kept = torch.cat([rows[table.mask() & mask].abs() for table, mask, rows in left])
    lost = torch.cat([rows[~table.mask() & mask].abs() for table, mask, rows in left])
    assert (kept < lost.max()).sum() <= 54  # only the largest of a row may be smaller than what went


def test_signed_sums_cancel_and_absolute_ones_do_not():
    sums = []
    for accumulate in ("signed", "absolute"):
        model, method, _ = sparserec(accumulate=accumulate, init="random", every=50)
        ids = torch.tensor([2])
        for sign in (1.0, -1.0):
            (sign * model.users(ids)).sum().backward()
            method.after_step()
        sums.append(method._absent[0].sums)
    absent = ~sums[1].bool()
    assert bool((sums[0] == 0).all()) and bool((sums[1][~absent] == 2).all()) and int(sums[1].sum()) > 0


def test_rows_outside_the_sample_learn_nothing():
    model, method, _ = sparserec(sample=0.25)
    ids = torch.arange(24)
    model.users(ids).sum().backward()
    grads = model.users.values.grad
    rows = torch.arange(24).repeat_interleave(model.users.mask().sum(1))
    learnt = {int(row) for row in rows[grads != 0]}
    assert len(learnt) == 6
    drawn = torch.zeros(24)
    for _ in range(300):
        drawn += method._draw(0, ids).float()
    degree = torch.bincount(CHOSEN[0], minlength=24)
    assert drawn[degree.topk(6).indices].mean() > 1.2 * drawn[degree.topk(6, largest=False).indices].mean()


def test_masks_stay_where_nothing_is_exchanged():
    model, method, optimizer = sparserec(exchanged=0.0)
    before = model.users.kept.clone()
    epoch(method, optimizer, 0)
    assert torch.equal(model.users.kept, before) and len(method._absent[0].rows) == 0


def test_a_budget_of_bytes_is_what_the_tables_take():
    wanted = 1_500
    model, method, _ = sparserec(size_bytes=wanted)
    assert wanted - 4 < bytes_of(method.tables) <= wanted
    assert method.budget == model.users.values.numel() + model.items.values.numel()


def test_a_resumed_training_ends_with_the_same_bits():
    def run(stop):
        model, method, optimizer = sparserec(sample=0.5)
        for number in range(3):
            epoch(method, optimizer, number)
            if number == stop:
                states = [dict(one.state_dict()) for one in (method, model, optimizer)]
                model, method, optimizer = sparserec(sample=0.5, seed=0)
                for one, state in zip((method, model, optimizer), states, strict=True):
                    one.load_state_dict(state)
        return model.state_dict()

    whole, resumed = run(None), run(1)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


BAD = [
    ({"init": "zeros"}, "init must be one of nmf, random, got 'zeros'"),
    ({"values": "ones"}, "values must be one of factors, normal"),
    ({"accumulate": "mean"}, "accumulate must be one of signed, absolute, last"),
    ({"every": 0}, "every must be at least 1, got 0"),
    ({"exchanged": 1.0}, r"exchanged must lie in \[0, 1\)"),
    ({"sample": 0.0}, r"sample in \(0, 1\]"),
    ({"interactions": None}, "need interactions"),
    ({"density": 0.1, "size_bytes": 3000}, "expected density or size_bytes, got both"),
    ({"size_bytes": 700}, "entries beside .* bytes of masks and positions, fewer than the 54 rows"),
    ({"dim": 8, "density": 0.25, "budget": 0.01}, "unexpected keyword"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=range(len(BAD)))
def test_bad_options(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        distiller = Plain(models.MF(SIZES, 8, density=0.25), Ranking())
        options = {name: value for name, value in options.items() if name != "dim"}
        SparseRec(distiller, **{"interactions": CHOSEN, "steps": 10, **options})


def test_a_density_below_one_entry_a_row_and_dense_tables_are_refused():
    with pytest.raises(ValueError, match=r"density must lie in \[0.125, 1\]"):
        SparseRec(Plain(models.MF(SIZES, 8, density=0.25), Ranking()), CHOSEN, steps=10, density=0.05)
    with pytest.raises(TypeError, match=r"MF must have `tables`, pairs .* of SparseEmbedding"):
        SparseRec(Plain(models.MF(SIZES, 8), Ranking()), CHOSEN, steps=10)


def test_rows_that_no_factor_explains_stay_finite():
    factor, other = torch.tensor([[1e-38]]), torch.tensor([[1e-2]])
    _update(factor, torch.ones(1, 1).to_sparse(), other)  # divides by 1e-42
    assert factor.isfinite().all()
    apart = torch.arange(40)  # every pair stands alone
    assert all(one.isfinite().all() for one in nmf(apart, apart, 40, 40, 4, sweeps=300))


def test_the_padding_row_stays_zero_and_small():
    """It learns nothing: neither the factorisation nor gradients of its places in a batch give it entries."""

    class Padded(models.MF):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.items = SparseEmbedding(30, 8, padding_idx=0, density=0.25)

    for values in ("factors", "normal"):
        model, method, optimizer = sparserec(kind=Padded, values=values, every=2)
        none = torch.zeros(1, dtype=torch.int64)
        for number in range(4):
            epoch(method, optimizer, number, after=lambda: None)
        assert not model.items(none).any() and int(model.items.mask()[0].sum()) == 1
        assert bool(model.items(torch.arange(1, 30)).any(1).all())


def test_a_frozen_table_keeps_its_entries():
    model, method, optimizer = sparserec(init="random", every=2)
    model.items.values.requires_grad_(False)
    before, users = model.items.to_dense().weight.clone(), model.users.kept.clone()
    epoch(method, optimizer, 0)
    assert torch.equal(model.items.to_dense().weight, before)
    assert method.num_kept == method.budget and not torch.equal(model.users.kept, users)
    with pytest.raises(ValueError, match="one is frozen; give init='random'"):
        SparseRec(method.distiller, CHOSEN, steps=5)
    # Frozen before, and where the budget is another one than what the tables keep; or with sums that wait.
    for density in (0.2, 0.35):
        again = SparseRec(method.distiller, init="random", density=density, steps=5)
        assert torch.equal(model.items.to_dense().weight, before) and again.num_kept == round(density * 54 * 8)
        again.close()
    with pytest.raises(ValueError, match="entries are left for the tables that learn, which hold 24 to 192"):
        SparseRec(method.distiller, init="random", density=0.9, steps=5)
    model, method, optimizer = sparserec(every=3)
    for number in range(3):
        if number == 2:
            model.items.values.requires_grad_(False)
            kept = model.items.kept.clone()
        inputs, target = next(iter(PART.batches(16, torch.Generator().manual_seed(number))))
        optimizer.zero_grad()
        method.loss(inputs, target).total.backward()
        optimizer.step()
        method.after_step()
    assert torch.equal(model.items.kept, kept)


@pytest.mark.parametrize("broken", [float("inf"), float("nan")])
def test_a_batch_that_overflows_has_no_say_in_what_grows(broken):
    """A scaled loss skips its step; the sums of the others decide."""
    kept = []
    for scale in (0.0, broken):
        _, method, optimizer = sparserec(every=2)
        for number, factor in enumerate((scale, 1.0)):
            inputs, target = next(iter(PART.batches(16, torch.Generator().manual_seed(number))))
            optimizer.zero_grad()
            (method.loss(inputs, target).total * factor).backward()
            if number:
                optimizer.step()
            method.after_step()
        kept.append([table.kept for table in method.tables])
    assert all(map(torch.equal, *kept))


def test_values_that_are_lost_are_refused_at_the_exchange():
    model, method, optimizer = sparserec(every=1)
    with torch.no_grad():
        model.items.values.fill_(float("nan"))
    with pytest.raises(ValueError, match="got NaN; load a checkpoint from before"):
        epoch(method, optimizer, 0)


@pytest.mark.parametrize("density", [0.15, 0.6])
def test_a_random_start_takes_any_budget(density):
    _, method, optimizer = sparserec(init="random", density=density)
    assert method.num_kept == method.budget == round(density * 54 * 8)
    epoch(method, optimizer, 0)
    assert method.num_kept == method.budget


def test_ids_may_be_given_by_name():
    class Named(models.MF):
        def forward(self, users, items, negatives):
            mine = self.users(input=users)
            others = self.items(input=negatives) @ mine[:, :, None]
            return (mine * self.items(input=items)).sum(1), others.squeeze(2)

    for sample in (1.0, 0.5):
        _, method, optimizer = sparserec(kind=Named, sample=sample)
        epoch(method, optimizer, 0)


class _Tables(torch.nn.Module):
    def __init__(self, tables):
        super().__init__()
        self.tables = tables


def test_tables_that_are_no_pairs_are_refused():
    one, two = SparseEmbedding(24, 8, density=0.5), SparseEmbedding(30, 8, density=0.5)
    other, bag = SparseEmbedding(30, 4, density=0.5), SparseEmbeddingBag(30, 8, density=0.5)
    for error, message, tables in (
        (TypeError, r"pairs \(users, items\) of SparseEmbedding", (one, two)),
        (TypeError, r"pairs \(users, items\) of SparseEmbedding", ((one,),)),
        (TypeError, r"pairs \(users, items\) of SparseEmbedding", ((one, bag),)),
        (ValueError, "as many dimensions as each other, got 8 and 4", ((one, other),)),
        (ValueError, "one table in two places", ((one, one),)),
        (ValueError, "one table in two places", ((one, two), (one, two))),
    ):
        with pytest.raises(error, match=message):
            SparseRec(Plain(_Tables(tables), Ranking()), CHOSEN, steps=5)


def test_interactions_that_name_other_rows_are_refused():
    users, items = CHOSEN
    for error, message, chosen in (
        (ValueError, r"items must lie in 0\.\.29, got 0\.\.30", (users, torch.cat([items[1:], torch.tensor([30])]))),
        (ValueError, r"users must lie in 0\.\.23", (items, users)),
        (ValueError, "two equally long vectors", (users, items[1:])),
        (TypeError, "items must be integers, got torch.float32", (users, items.float())),
        (ValueError, "got no pairs", (users[:0], items[:0])),
    ):
        with pytest.raises(error, match=message):
            sparserec(interactions=chosen)
