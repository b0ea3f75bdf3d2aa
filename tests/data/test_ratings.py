"""Features of timed ratings: no row knows the future."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekd.data import ratings


def small_log(seed=0, count=300, users=12, items=15, times=60):
    """Times with many ties, as users rate several films in one second."""
    rng = np.random.default_rng(seed)
    columns = (rng.integers(1, n + 1, count) for n in (users, items, 10, times))
    user, item, value, time = columns
    return ratings.Log(user, item, value.astype(np.float64), time * 1000)


def small_items(count=15, tags=40):
    rng = np.random.default_rng(1)
    names = ("Comedy", "Drama", "War")
    return ratings.Items(
        ids=np.arange(1, count + 1),
        titles=[f"Film {i}" for i in range(count)],
        years=np.where(np.arange(count) == 3, np.nan, 1970.0 + np.arange(count)),
        genres=[[name for name in names if rng.random() < 0.5] for _ in range(count)],
        tag_items=rng.integers(1, count + 1, tags),
        tag_times=rng.integers(1, 60, tags) * 1000,
        tag_texts=[f"tag{i % 7}" for i in range(tags)],
    )


def small_task(log, items=None):
    return ratings.build("movielens", log, items or small_items(), (0.0, 10.0), {})


def all_features(task):
    """The table of all rows in the order of time (stable, as the builder sorts)."""
    return np.concatenate([part.features for part in (task.train, task.val, task.test)])


@settings(deadline=None, max_examples=50)
@given(
    events=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(-9, 9)), max_size=20),
    queries=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 7)), max_size=8),
)
def test_earlier_is_the_plain_double_loop(events, queries):
    keys, times, values = (np.array([event[i] for event in events], dtype=np.int64) for i in range(3))
    at_keys, at_times = (np.array([query[i] for query in queries], dtype=np.int64) for i in range(2))
    before = [[i for i in range(len(events)) if keys[i] == k and times[i] < t] for k, t in queries]
    earlier = ratings.Earlier(keys, times, at_keys, at_times)
    assert earlier.count.tolist() == [len(rows) for rows in before]
    assert earlier.sum(values / 4).tolist() == [sum(values[i] / 4 for i in rows) for rows in before]
    latest = [max(rows, key=lambda i: (times[i], i)) if rows else None for rows in before]
    assert earlier.latest(values, default=-99).tolist() == [-99 if i is None else values[i] for i in latest]


@pytest.mark.parametrize("row", [0, 40, 150, 250, 299])
def test_changing_a_rating_changes_no_feature_that_is_not_later(row):
    log = small_log()
    log = log.take(np.argsort(log.times, kind="stable"))
    before = all_features(small_task(log))
    values = log.values.copy()
    values[row] = 10.0 - values[row] + (values[row] == 5.0)
    after = all_features(small_task(ratings.Log(log.users, log.items, values, log.times)))
    not_later = log.times <= log.times[row]
    np.testing.assert_array_equal(before[not_later], after[not_later])
    later_of_the_user = ~not_later & (log.users == log.users[row])
    if later_of_the_user.any():  # the features do see the past
        assert (before[later_of_the_user] != after[later_of_the_user]).any(1).all()


def test_dropping_the_test_ratings_changes_no_train_or_val_row():
    log = small_log()
    log = log.take(np.argsort(log.times, kind="stable"))
    whole = small_task(log)
    first_test = len(whole.train) + len(whole.val)
    values = log.values.copy()
    values[first_test:] = 0.0
    other = small_task(ratings.Log(log.users, log.items, values, log.times))
    for name in ("train", "val"):
        for x, y in zip(getattr(whole, name).inputs, getattr(other, name).inputs, strict=True):
            assert torch.equal(x, y)


def test_a_tag_is_seen_only_by_later_ratings():
    log = small_log()
    log = log.take(np.argsort(log.times, kind="stable"))
    items = small_items()
    before = all_features(small_task(log, items))
    texts = [*items.tag_texts[:-1], "something else entirely"]
    changed = ratings.Items(
        items.ids, items.titles, items.years, items.genres, items.tag_items, items.tag_times, tag_texts=texts
    )
    after = all_features(small_task(log, changed))
    sees = (log.items == items.tag_items[-1]) & (log.times > items.tag_times[-1])
    np.testing.assert_array_equal(before[~sees], after[~sees])
    assert sees.any() and (before[sees] != after[sees]).any(1).all()


def test_vocabularies_come_from_train_rows():
    log = small_log()
    order = np.argsort(log.times, kind="stable")
    users, items = log.users.copy(), log.items.copy()
    users[order[-5:]], items[order[-5:]] = 99, 15
    content = small_items()
    content.genres[14].append("OnlyInTest")
    keep = (items != 15) | np.isin(np.arange(len(items)), order[-5:])
    task = small_task(ratings.Log(users, items, log.values, log.times).take(keep), content)
    assert task.test.users[-5:].tolist() == [0] * 5 and task.test.items[-5:].tolist() == [0] * 5
    assert task.sizes["users"] == 12 + 1 and task.sizes["items"] == 14 + 1
    assert task.meta["counts"]["test_rows_of_new_users"] >= 5
    known = small_task(ratings.Log(users, items, log.values, log.times).take(keep), small_items())
    assert task.sizes["item_features"] == known.sizes["item_features"]  # the genre no train row has gets no column


def test_equal_times_stay_on_one_side_of_the_split():
    task = small_task(small_log(times=12))
    log = small_log(times=12)
    times = np.sort(log.times)
    edges = np.cumsum([len(task.train), len(task.val)])
    assert all(times[edge - 1] < times[edge] for edge in edges)
    assert task.meta["val_begins"] == times[edges[0]] and task.meta["test_begins"] == times[edges[1]]


def test_running_biases_of_a_hand_made_log():
    """Two ratings of one item, 8 then 4: the second sees (5 + 8) / 2 as mean and 3 / (1 + shrink) as item effect."""
    log = ratings.Log(*(np.array(x) for x in ([1, 2, 3], [1, 1, 1])), np.array([8.0, 4.0, 6.0]), np.array([10, 20, 30]))
    _, _, prior = ratings.history(log, np.zeros((3, 1), np.float32), (0.0, 10.0))
    second = 6.5 + 3.0 / (1 + ratings.SHRINK_ITEM)
    third = 17 / 3 + (3.0 + (4.0 - 6.5)) / (2 + ratings.SHRINK_ITEM)
    np.testing.assert_allclose(prior, [5.0, second, third], rtol=1e-6)
