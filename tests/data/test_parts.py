"""Parts hand out every row once, negatives that nobody has seen, and periods in the order of time."""

import doctest

import numpy as np
import pytest
import torch

from sparsekd import data
from sparsekd.data import Pairs, Part, Period, Rows, histories, parts, periods
from sparsekd.goals import Ranking


def numbered(rows, **fields):
    """Rows whose input and target are their number."""
    return Rows((torch.arange(rows),), torch.arange(float(rows)), None, **fields)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def drawn(part, size, seed):
    return torch.cat([target for _, target in part.batches(size, seeded(seed))])


# Rows


def test_batches_cover_every_row_once_and_repeat_with_the_seed():
    part = numbered(10_000)
    assert torch.equal(torch.cat([y for _, y in part.batches(1024)]), part.target)
    shuffled = [drawn(part, 999, seed) for seed in (3, 3, 4)]
    assert torch.equal(shuffled[0], shuffled[1]) and not torch.equal(shuffled[0], shuffled[2])
    assert torch.equal(shuffled[0].sort().values, part.target.sort().values)
    sizes = [len(y) for _, y in part.batches(3333, seeded(0))]
    assert sizes == [3333] * 3  # the last batch of one row is left out
    assert part.steps(3333) == 4 and part.steps(2500) == 4 and part.steps(20_000) == 1


@pytest.mark.parametrize("rows", [slice(-3, None), np.array([4, 0, 2]), np.arange(6) % 2 == 0])
def test_take_picks_the_same_rows_of_everything(rows):
    number = np.arange(6)
    columns = (number, number + 10, number.astype(np.float32))
    part = data.Rows((torch.arange(6),), torch.arange(6.0), number[:, None].astype(np.float32), *columns).take(rows)
    for column in (part.inputs[0], part.target, part.features[:, 0], part.users, part.items - 10, part.weight):
        assert np.asarray(column).tolist() == number[rows].tolist()


def test_weighted_epochs_draw_rows_by_their_weight():
    weight = np.array([1.0, 3.0, 0.0, 4.0], np.float32).repeat(1000)
    rows = torch.arange(4).repeat_interleave(1000)
    part = data.Rows((rows,), rows.float(), np.zeros((4000, 1), np.float32), weight=weight)
    shares = torch.bincount(drawn(part, 100, 0).long(), minlength=4) / 4000
    torch.testing.assert_close(shares, torch.tensor([0.125, 0.375, 0.0, 0.5]), atol=0.03, rtol=0)


@pytest.mark.parametrize("kind", ["rows", "pairs", "period"])
@pytest.mark.parametrize("training", [False, True])
def test_ranks_share_every_batch(kind, training):
    part = {"rows": numbered(24), "pairs": some_pairs(24), "period": Period(numbered(24), 0, 1)}[kind]

    def batches(rank=0, ranks=1):
        return list(part.batches(10, seeded(5) if training else None, rank, ranks))

    for whole, *shares in zip(batches(), batches(0, 2), batches(1, 2), strict=True):
        for place, column in enumerate(whole[0]):
            for rank, (inputs, _) in enumerate(shares):
                assert torch.equal(inputs[place], column[rank::2])


@pytest.mark.parametrize("weight", [None, np.arange(24.0)], ids=["evenly", "weighted"])
def test_batches_may_come_with_the_numbers_of_their_rows(weight):
    part = numbered(24, weight=weight)
    for rank, ranks in ((0, 1), (1, 2)):
        plain = part.batches(10, seeded(5), rank, ranks)
        for (rows, (inputs, target)), batch in zip(part.numbered(10, seeded(5), rank, ranks), plain, strict=True):
            assert torch.equal(inputs[0], batch[0][0]) and torch.equal(target, batch[1])
            assert torch.equal(part.inputs[0][rows], inputs[0]) and torch.equal(part.target[rows], target)


def test_training_leaves_out_batches_with_less_than_two_rows_a_rank():
    for rows, ranks, expected in ((11, 1, 1), (12, 1, 2), (13, 2, 1), (14, 2, 2)):
        for part in (numbered(rows), some_pairs(rows), Period(numbered(rows), 0, 1)):
            for rank in range(ranks):
                batches = list(part.batches(10, seeded(0), rank, ranks))
                assert len(batches) == expected
            assert len(list(part.batches(10))) == 2  # all of them are scored


def test_rows_are_prepared_and_augmented_by_the_generator():
    def prepare(inputs, generator):
        return (inputs[0] + (0 if generator is None else 100),)

    part = numbered(4, prepare=prepare)
    assert next(part.batches(4))[0][0].tolist() == [0, 1, 2, 3]
    assert next(part.batches(4, seeded(0)))[0][0].min() == 100
    assert next(Period(part, 0, 1).batches(4, seeded(0)))[0][0].tolist() == [100, 101, 102, 103]


@pytest.mark.parametrize("kind", ["rows", "pairs", "period"])
def test_examples_start_over_where_there_are_too_few(kind):
    part: Part = {"rows": numbered(3), "pairs": some_pairs(3), "period": Period(numbered(3), 0, 1)}[kind]
    first = part.examples(5)[0]
    assert torch.equal(first, first[:3].repeat(2)[:5])
    assert all(len(column) == 5 for column in part.examples(5)) and len(part.examples()[0]) == 2
    assert len(part.to("cpu")) == len(part) == 3


# Pairs


def some_pairs(count, users=6, items=9, negatives=2):
    """Random pairs, with the train history of `count` others; user 0 has seen all items but one, user 1 none."""
    chosen = torch.randint(2, users, (count,)), torch.randint(0, items, (count,))
    all_but = torch.arange(items)[torch.arange(items) != 4]
    history = torch.cat([chosen[0], torch.zeros(items - 1, dtype=torch.int64)]), torch.cat([chosen[1], all_but])
    seen = [
        (user, item) for user, item in zip(*(column.tolist() for column in history), strict=True) if item != user
    ]  # nobody has seen everything
    offsets, entries = histories(*torch.tensor(seen).T, users, items)
    return Pairs(torch.arange(count) % users, torch.arange(count) % items, items, offsets, entries, negatives)


def seen_by(part, user):
    return part.seen_items[part.seen_offsets[user] : part.seen_offsets[user + 1]].tolist()


def test_histories_are_those_of_a_hand_made_log():
    offsets, items = histories(torch.tensor([2, 0, 2, 2]), torch.tensor([5, 1, 3, 5]), 4, 6)
    assert (offsets.tolist(), items.tolist()) == ([0, 1, 1, 3, 3], [1, 3, 5])
    result = doctest.testmod(parts)
    assert result.attempted > 0 and result.failed == 0
    for users, chosen, message in (([4], [0], r"users must lie in 0\.\.3, got 4\.\.4"), ([0], [-1], r"items must lie")):
        with pytest.raises(ValueError, match=message):
            histories(torch.tensor(users), torch.tensor(chosen), 4, 6)


def test_numbers_of_32_bits_are_pairs_as_well():
    """70 000 x 40 000 pairs have numbers that 32 bits do not hold."""
    sizes, users = (70_000, 40_000), torch.tensor([69_000, 65_537, 69_000])
    items = torch.tensor([39_000, 5, 7])
    offsets, seen = histories(users.int(), items.int(), *sizes)
    assert all(map(torch.equal, (offsets, seen), histories(users, items, *sizes)))
    part = Pairs(users.int(), items.int(), 40_000, offsets.int(), seen.int(), 2000)
    assert {part.users.dtype, part.items.dtype, part.seen_offsets.dtype, part.seen_items.dtype} == {torch.int64}
    long = Pairs(users, items, 40_000, offsets, seen, 2000)
    assert torch.equal(part.examples(3)[2], long.examples(3)[2])
    with pytest.raises(TypeError, match=r"histories: users must be integers, got torch.float32; use .long\(\)"):
        histories(users.float(), items, *sizes)
    with pytest.raises(TypeError, match="Pairs: items must be integers"):
        Pairs(users, items.double(), 40_000, offsets, seen)


def test_negatives_are_never_of_the_history_and_all_others_are_drawn_alike():
    part = some_pairs(24_000, negatives=3)
    counts = torch.zeros(6, 9)
    for (users, _, negatives), target in part.batches(1000, seeded(0)):
        assert negatives.shape == (len(users), 3) and target.shape == (len(users), 0)
        counts.index_put_((users[:, None].expand_as(negatives), negatives), torch.tensor(1.0), accumulate=True)
    for user in range(6):
        unseen = sorted(set(range(9)) - set(seen_by(part, user)))
        assert counts[user].nonzero().flatten().tolist() == unseen
        torch.testing.assert_close(
            counts[user, unseen] / 12_000, torch.full((len(unseen),), 1 / len(unseen)), atol=0.02, rtol=0
        )


def test_pairs_stay_together_and_repeat_with_the_seed():
    part = some_pairs(50)
    epochs = [
        [torch.cat(columns) for columns in zip(*(inputs for inputs, _ in part.batches(8, seeded(s))), strict=True)]
        for s in (3, 3, 4)
    ]
    assert all(torch.equal(x, y) for x, y in zip(epochs[0], epochs[1], strict=True))
    assert not torch.equal(epochs[0][0], epochs[2][0]) and not torch.equal(epochs[0][2], epochs[2][2])
    assert sorted(zip(*(c.tolist() for c in epochs[0][:2]), strict=True)) == sorted(
        zip(part.users.tolist(), part.items.tolist(), strict=True)
    )
    in_order = [torch.cat(columns) for columns in zip(*(inputs for inputs, _ in part.batches(8)), strict=True)]
    again = [torch.cat(columns) for columns in zip(*(inputs for inputs, _ in part.batches(8)), strict=True)]
    assert torch.equal(in_order[0], part.users) and torch.equal(in_order[1], part.items)
    assert torch.equal(in_order[2], again[2])


def test_a_ranking_goal_learns_from_pairs_and_scores_them():
    """Users of one half choose items of one half: factors learn it, and held-out items come first."""
    users = torch.arange(8).repeat_interleave(3)
    chosen = torch.tensor([[0, 1, 2], [1, 2, 3], [2, 3, 0], [3, 0, 1]] * 2)
    chosen[4:] += 4
    offsets, items = histories(users, chosen.flatten(), 8, 8)
    train = Pairs(users, chosen.flatten(), 8, offsets, items, negatives=2)
    held_out = torch.tensor([3, 0, 1, 2, 7, 4, 5, 6])
    test = Pairs(torch.arange(8), held_out, 8, offsets, items)
    assert not set(zip(range(8), held_out.tolist(), strict=True)) & set(
        zip(users.tolist(), chosen.flatten().tolist(), strict=True)
    )

    class Factors(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.users, self.items = torch.nn.Embedding(8, 4), torch.nn.Embedding(8, 4)

        def forward(self, users, items, negatives):
            user = self.users(users)
            return (user * self.items(items)).sum(1), torch.einsum("bd,bkd->bk", user, self.items(negatives))

        def score_items(self, users):
            return self.users(users) @ self.items.weight.T

    model, goal = Factors(), Ranking((1, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for epoch in range(30):
        for inputs, target in train.batches(8, seeded(epoch)):
            optimizer.zero_grad()
            goal.loss(model(*inputs), target).backward()
            optimizer.step()
    assert goal.scores(model, test)["recall@1"] > 0.8


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"items": torch.tensor([0])}, r"two equally long vectors, got \(2,\) and \(1,\)"),
        ({"negatives": 0}, "negatives must be at least 1, got 0"),
        ({"users": torch.tensor([0, 2])}, r"users must lie in 0\.\.1, got 0\.\.2"),
        ({"items": torch.tensor([0, 4])}, r"items must lie in 0\.\.3, got 0\.\.4"),
        ({"seen_items": torch.tensor([0, 9, 3])}, r"seen_items must lie in 0\.\.3, got 0\.\.9"),
        ({"seen_items": torch.tensor([1, 0, 3])}, "the seen_items of a user must rise, each once"),
        ({"seen_items": torch.tensor([1, 1, 3])}, "the seen_items of a user must rise, each once"),
        ({"seen_offsets": torch.tensor([0, 2, 2])}, "seen_offsets must rise from 0 to 3"),
        ({"seen_offsets": torch.tensor([0, 4, 3])}, "seen_offsets must rise from 0 to 3"),
        (
            {"seen_items": torch.arange(4), "seen_offsets": torch.tensor([0, 4, 4])},
            "user 0 has seen all 4 items, so that no negative can be drawn",
        ),
    ],
)
def test_pairs_refuse_what_they_cannot_draw_from(fields, message):
    good = {
        "users": torch.tensor([0, 1]),
        "items": torch.tensor([0, 3]),
        "num_items": 4,
        "seen_offsets": torch.tensor([0, 2, 3]),
        "seen_items": torch.tensor([0, 2, 3]),
    }
    assert len(Pairs(**good)) == 2
    with pytest.raises(ValueError, match=message):
        Pairs(**{**good, **fields})


# Periods


def test_periods_cut_a_stream_at_its_edges():
    windows = periods(numbered(6), np.array([0, 1, 1, 4, 5, 7]), [0, 1, 5, 8])
    assert [(window.start, window.end, len(window)) for window in windows] == [(0, 1, 1), (1, 5, 3), (5, 8, 2)]
    assert [window.rows.target.tolist() for window in windows] == [[0], [1, 2, 3], [4, 5]]
    assert torch.cat([window.rows.inputs[0] for window in windows]).tolist() == list(range(6))


def test_a_period_is_never_shuffled():
    window = Period(numbered(100), 0.0, 1.0)
    for generator in (None, seeded(0)):
        assert torch.cat([y for _, y in window.batches(7, generator)]).tolist() == list(range(100))
    assert window.steps(7) == 15


@pytest.mark.parametrize(
    ("times", "edges", "message"),
    [
        ([0, 2, 1, 3], [0, 4], "times must not fall, got 1 after 2 in row 2; sort the rows by time first"),
        ([0, 1, np.nan, 3], [0, 4], "times must not fall"),
        ([0, 1, 2], [0, 4], r"expected 4 times, one a row, got \(3,\)"),
        ([0, 1, 2, 3], [0, 2, 2, 4], "edges must be two or more rising times"),
        ([0, 1, 2, 3], [0], "edges must be two or more rising times"),
        ([0, 1, 2, 3], [1, 4], r"the edges 1\.\.4 must hold all times, got 0\.\.3"),
        ([0, 1, 2, 3], [0, 3], r"the edges 0\.\.3 must hold all times, got 0\.\.3"),
        ([0, 1, 2, 3], [0, 1.5, 1.7, 4], r"no row lies in 1\.5\.\.1\.7; join this window to one beside it"),
    ],
)
def test_periods_refuse_what_is_no_stream(times, edges, message):
    with pytest.raises(ValueError, match=message):
        periods(numbered(4), np.array(times, dtype=float), edges)


def test_periods_refuse_weighted_rows():
    with pytest.raises(ValueError, match="rows with weights are drawn at random"):
        periods(numbered(2, weight=np.ones(2, np.float32)), np.arange(2), [0, 2])
