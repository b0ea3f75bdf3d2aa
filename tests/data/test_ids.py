"""Ids and time stamps of any size: read exactly, never multiplied, told apart."""

import numpy as np
import pytest

from sparsekd import data
from sparsekd.data import ratings, sources

STEAM = 76561198000000000  # where the ids of a large shop begin, past 2**53


def load(folder, base, step=1):
    rng = np.random.default_rng(0)
    folder.mkdir()
    rows = [
        f"{base + step * rng.integers(20)},{rng.integers(15)},{rng.choice([1, 3, 5])},{10**9 + k * 10**6}"
        for k in range(400)
    ]
    (folder / "ratings.csv").write_text("userId,movieId,rating,timestamp\n" + "\n".join(rows) + "\n")
    movies = [f"{i},F{i} (1990),A" for i in range(15)]
    (folder / "movies.csv").write_text("movieId,title,genres\n" + "\n".join(movies) + "\n")
    return data.load("movielens", folder)


@pytest.mark.parametrize(("base", "step"), [(STEAM, 1), (2**63 - 21, 1), (10**11, 10**13)])
def test_large_ids_give_the_same_task_as_small_ones(tmp_path, base, step):
    small, large = load(tmp_path / "small", 1), load(tmp_path / "large", base, step)
    assert large.meta["counts"] == small.meta["counts"]
    assert large.meta["counts"]["users"] == 20
    for part in ("train", "val", "test"):
        assert (getattr(large, part).features == getattr(small, part).features).all()


@pytest.mark.parametrize("largest", [10**12, 2**62])
def test_earlier_counts_what_is_earlier_whatever_the_numbers_are(largest):
    rng = np.random.default_rng(0)
    ids = np.sort(rng.choice(largest, 20))
    pick = rng.integers(0, 20, 500)
    times = np.sort(rng.integers(0, largest, 500))
    got, want = ratings.Earlier(ids[pick], times), ratings.Earlier(pick, np.arange(500))
    assert (got.count == want.count).all()
    assert (got.latest(times, -1) == want.latest(times, -1)).all()


@pytest.mark.parametrize(
    ("text", "whole", "want"),
    [("76561198000000001", True, 76561198000000001), ("12.0", True, 12), ("1e3", True, 1000), ("7.9", False, 7)],
)
def test_integers_are_read_exactly(text, whole, want):
    assert sources.integer("a.csv", "user", 1, text, whole) == want


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("7.5", "must be a whole number, got '7.5'"),
        ("1e17", "must be a whole number, got '1e17'"),
        (str(2**63), "must fit 64 bits"),
        ("x", "must be a finite number, got 'x'"),
        ("nan", "must be a finite number"),
    ],
)
def test_what_would_become_another_id_is_refused(text, says):
    with pytest.raises(ValueError, match=f"a.csv row 3: user {says}"):
        sources.integer("a.csv", "user", 3, text)
