"""Timed ratings -> a Task, without a look into the future.

One rule for every row of train, val and test: a feature made from ratings (or tags) uses only those with a strictly
earlier time stamp. So changing a rating changes no feature of any row that is not later, which is what the tests check.
Networks and baselines are fitted on train alone; in val and test the running histories go on, as they would in a
system that serves. Vocabularies (users, items, genres) and the scaling of content features come from train rows.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..goals import Regression
from . import sources
from .parts import Rows
from .task import Task

TITLE_BUCKETS = 32
TAG_BUCKETS = 32
# A mean of n residuals counts as n / (n + shrink): whoever has few ratings is taken to have no effect.
SHRINK_ITEM = 4.0
SHRINK_USER = 4.0
SHRINK_GENRE = 8.0
# Running sums are kept as integer multiples of 1 / _UNIT, so that they are exact whatever the order of the rows.
_UNIT = 2.0**20


@dataclass(frozen=True)
class Log:
    """N timed events: users, items, times int64 [N]; values float64 [N]."""

    users: np.ndarray
    items: np.ndarray
    values: np.ndarray
    times: np.ndarray

    @classmethod
    def parse(
        cls, name: str, users: Iterable[str], items: Iterable[str], values: Iterable[str], times: Iterable[str]
    ) -> Log:
        """From columns of text; ValueError names the row that is no number."""
        user, item, time = (
            np.array(
                [sources.integer(name, column, row, text, whole) for row, text in enumerate(texts, 1)], dtype=np.int64
            )
            for column, texts, whole in (("user", users, True), ("item", items, True), ("time", times, False))
        )
        value = np.array([sources.number(name, "rating", row, text) for row, text in enumerate(values, 1)], np.float64)
        return cls(user, item, value, time)

    def __len__(self) -> int:
        return len(self.users)

    def take(self, rows: np.ndarray) -> Log:
        return Log(self.users[rows], self.items[rows], self.values[rows], self.times[rows])


@dataclass(frozen=True)
class Items:
    """M items: ids int64 [M], titles, years float [M] (NaN: not known), genres; and timed tags on them."""

    ids: np.ndarray
    titles: Sequence[str]
    years: np.ndarray
    genres: Sequence[Sequence[str]]
    tag_items: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    tag_times: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    tag_texts: Sequence[str] = ()


class Earlier:
    """For each query, the events with the same key and a strictly earlier time.

    keys, times  int64 [N] events; at_keys, at_times  int64 [Q] queries (default: the events themselves).
    """

    def __init__(
        self,
        keys: np.ndarray,
        times: np.ndarray,
        at_keys: np.ndarray | None = None,
        at_times: np.ndarray | None = None,
    ):
        at_keys = keys if at_keys is None else at_keys
        at_times = times if at_times is None else at_times
        self._order = np.lexsort((times, keys))
        # One number that sorts by key, then by time: of ranks, because ids may be too large to multiply.
        key, at_key, _ = _ranks(keys, at_keys)
        time, at_time, moments = _ranks(times, at_times)
        moment = (key * moments + time)[self._order]
        self._first = np.searchsorted(moment, at_key * moments)
        self._end = np.searchsorted(moment, at_key * moments + at_time)
        self.count = self._end - self._first  # [Q]

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Sum of `values` [N] or [N, D] over the earlier events: [Q] or [Q, D].  Exact to 2**-20 in a value."""
        steps = np.rint(values[self._order] * _UNIT).astype(np.int64)
        running = np.concatenate([np.zeros_like(steps[:1], shape=(1, *steps.shape[1:])), np.cumsum(steps, axis=0)])
        return (running[self._end] - running[self._first]) / _UNIT

    def latest(self, values: np.ndarray, default: float) -> np.ndarray:
        """`values` [N] of the latest earlier event: [Q]; `default` where there is none."""
        if not len(self._order):
            return np.full(self.count.shape, default)
        latest = self._order[np.maximum(self._end - 1, 0)]
        return np.where(self.count > 0, values[latest], default)


def _ranks(events: np.ndarray, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Places of the events and of the queries among the distinct values of both, and how many of these there are."""
    values, place = np.unique(np.concatenate([events, queries]), return_inverse=True)
    return place[: len(events)], place[len(events) :], len(values)


def build(
    name: str,
    log: Log,
    items: Items,
    target_range: tuple[float, float],
    meta: dict[str, Any],
    shares: tuple[float, float] = (0.8, 0.9),
) -> Task[Rows]:
    """Split the log by time and make features, as the head of this module says.

    `shares`: where val and test begin, as shares of the rows; equal time stamps stay on one side.
    """
    _check(name, log, target_range)
    log = log.take(np.argsort(log.times, kind="stable"))
    begin_val, begin_test = (log.times[int(len(log) * share)] for share in shares)
    parts = [log.times < begin_val, (log.times >= begin_val) & (log.times < begin_test), log.times >= begin_test]
    if not all(part.any() for part in parts):
        raise ValueError(
            f"sparsekd.data.load({name!r}): {len(log)} ratings with too few distinct times to split 80/10/10"
        )
    train = parts[0]

    user_ids, item_ids = np.unique(log.users[train]), np.unique(log.items[train])
    users, items_ = _index(user_ids, log.users), _index(item_ids, log.items)
    genres = _genres(log, items, train)
    user_features, item_features, prior = history(log, genres, target_range)
    item_features = np.concatenate([item_features, genres, _content(log, items, train), _tags(log, items)], axis=1)
    table = np.concatenate([prior[:, None], user_features, item_features], axis=1)

    def split(rows: np.ndarray) -> Rows:
        return Rows(
            inputs=(
                torch.from_numpy(user_features[rows]),
                torch.from_numpy(item_features[rows]),
                torch.from_numpy(prior[rows]),
            ),
            target=torch.from_numpy(log.values[rows].astype(np.float32)),
            features=table[rows],
            users=users[rows],
            items=items_[rows],
        )

    counts = {
        "ratings": len(log),
        "users": len(np.unique(log.users)),
        "items": len(np.unique(log.items)),
        **{f"{part}_rows": int(rows.sum()) for part, rows in zip(("train", "val", "test"), parts, strict=True)},
        "test_rows_of_new_users": int((users[parts[2]] == 0).sum()),
        "test_rows_of_new_items": int((items_[parts[2]] == 0).sum()),
    }
    return Task(
        name=name,
        train=split(parts[0]),
        val=split(parts[1]),
        test=split(parts[2]),
        goal=Regression(target_range),
        sizes={
            "users": len(user_ids) + 1,
            "items": len(item_ids) + 1,
            "user_features": user_features.shape[1],
            "item_features": item_features.shape[1],
        },
        mean=float(log.values[train].mean()),
        split="by time, 80/10/10 of the ratings; histories hold strictly earlier ratings only, also in val and test",
        meta={**meta, "counts": counts, "val_begins": int(begin_val), "test_begins": int(begin_test)},
    )


def _check(name: str, log: Log, target_range: tuple[float, float]) -> None:
    low, high = target_range
    wrong = np.flatnonzero(
        (log.values < low) | (log.values > high) | (log.times < 0) | (log.users < 0) | (log.items < 0)
    )
    if len(wrong):
        row = wrong[0]
        raise ValueError(
            f"sparsekd.data.load({name!r}): ratings must lie in {low:g}..{high:g} with ids and times >= 0; "
            f"row {row + 1} is user {log.users[row]}, item {log.items[row]}, rating {log.values[row]:g}, "
            f"time {log.times[row]}; correct or drop it"
        )


def _index(vocabulary: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Position in the sorted vocabulary + 1; 0 for what is not in it."""
    place = np.searchsorted(vocabulary, ids).clip(max=len(vocabulary) - 1)
    return np.where(vocabulary[place] == ids, place + 1, 0)


def _rows_of(log: Log, items: Items) -> np.ndarray:
    """Row in `items` of every event, -1 where the item has no content."""
    order = np.argsort(items.ids)
    return np.concatenate([[-1], order])[_index(items.ids[order], log.items)]


def genres_of(log: Log, items: Items) -> np.ndarray:
    """Multi-hot genres float32 [N, G] of every row, of a log that is not split."""
    return _genres(log, items, np.ones(len(log), bool))


def _genres(log: Log, items: Items, train: np.ndarray) -> np.ndarray:
    """Multi-hot genres float32 [N, G]; the genres are those of the train rows."""
    rows = _rows_of(log, items)
    names = sorted({genre for row in np.unique(rows[train & (rows >= 0)]) for genre in items.genres[row]})
    place = {genre: column for column, genre in enumerate(names)}
    table = np.zeros((len(items.ids) + 1, len(names)), np.float32)  # the last row stands for "no content"
    for row, genres in enumerate(items.genres):
        table[row, [place[genre] for genre in genres if genre in place]] = 1.0
    return table[rows]


def history(
    log: Log, genres: np.ndarray, target_range: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """User features [N, Fu], item features [N, Fi] and the running bias prediction [N], all float32.

    The prediction is mean + item effect + user effect (Koren, Bell & Volinsky 2009, equation 1), each a shrunk mean
    over strictly earlier ratings: the item's of rating - mean, the user's of rating - mean - item effect, with the mean
    and the effect as they were when that rating was given.
    """
    middle, scale = sum(target_range) / 2, (target_range[1] - target_range[0]) / 2
    everything = Earlier(np.zeros_like(log.users), log.times)
    mean = (everything.sum(log.values) + middle) / (everything.count + 1)
    by_item, by_user = Earlier(log.items, log.times), Earlier(log.users, log.times)
    over_mean = log.values - mean
    item_effect = by_item.sum(over_mean) / (by_item.count + SHRINK_ITEM)
    over_item = over_mean - item_effect
    user_effect = by_user.sum(over_item) / (by_user.count + SHRINK_USER)
    rest = over_item - user_effect
    taste = by_user.sum(rest[:, None] * genres) / (by_user.sum(genres) + SHRINK_GENRE)  # [N, G]
    affinity = (taste * genres).sum(1) / np.maximum(genres.sum(1), 1)
    gap = log.times - by_user.latest(log.times, default=0)
    user = [
        user_effect / scale,
        np.log1p(by_user.count) / 4,
        by_user.sum(np.abs(rest)) / (by_user.count + 1) / scale,
        by_user.latest(rest, default=0.0) / scale,
        np.where(by_user.count > 0, np.log1p(gap) / 16, 1.0),
        affinity / scale,
    ]
    item = [
        item_effect / scale,
        np.log1p(by_item.count) / 4,
        by_item.sum(np.abs(over_mean)) / (by_item.count + 1) / scale,
        by_item.latest(over_mean, default=0.0) / scale,
        (mean - middle) / scale,
    ]
    user_features = np.concatenate([np.stack(user, axis=1), taste / scale], axis=1)
    prior = (mean + item_effect + user_effect).clip(*target_range)
    return user_features.astype(np.float32), np.stack(item, axis=1).astype(np.float32), prior.astype(np.float32)


def _content(log: Log, items: Items, train: np.ndarray) -> np.ndarray:
    """Year (standardised on train rows), age when rated, and hashed title words: float32 [N, 3 + TITLE_BUCKETS]."""
    rows = _rows_of(log, items)
    year = np.append(items.years, np.nan)[rows]
    known = np.isfinite(year)
    seen = year[train & known] if (train & known).any() else np.zeros(1)
    age = log.times / (365.25 * 86400) + 1970 - year
    words = np.array([_hashed(title, TITLE_BUCKETS) for title in (*items.titles, "")], dtype=np.float32)
    columns = [
        np.where(known, (year - seen.mean()) / max(seen.std(), 1.0), 0.0),
        np.where(known, np.log1p(np.maximum(age, 0.0)) / 2, 0.0),
        known,
    ]
    return np.concatenate([np.stack(columns, axis=1).astype(np.float32), words[rows]], axis=1)


def _tags(log: Log, items: Items) -> np.ndarray:
    """Hashed words of tags the item got strictly earlier, log1p of sums: float32 [N, TAG_BUCKETS], no tags: [N, 0]."""
    if not len(items.tag_texts):
        return np.zeros((len(log), 0), np.float32)
    hashed = np.abs(np.array([_hashed(text, TAG_BUCKETS) for text in items.tag_texts]))
    earlier = Earlier(items.tag_items, items.tag_times, log.items, log.times)
    return np.log1p(earlier.sum(hashed)).astype(np.float32)


def _hashed(text: str, buckets: int) -> np.ndarray:
    """Signed word counts by CRC-32, divided by the root of the number of words: float32 [buckets]."""
    vector = np.zeros(buckets, np.float32)
    words = re.findall(r"\w+", text.lower())
    for word in words:
        code = zlib.crc32(word.encode())
        vector[code % buckets] += 1.0 if code & 0x80000000 else -1.0
    return vector / max(len(words), 1) ** 0.5
