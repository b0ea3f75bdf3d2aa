"""What users chose -> a Task that ranks items: users and items numbered, a split, histories, and what was left out.

    task = data.load("rankings")                                # MovieTweetings, ratings of 7 and more
    task = data.load("rankings", "my-shop", columns={"user": "customer", "item": "sku"})
    task.meta["split_sha256"]                                   # two that are equal have the very same parts

The rules, each of which `Task.meta` counts:
    duplicates                  a pair that is there twice counts once.
    below_the_rating            pairs rated below `min_rating` are left out.
    of_other_items              pairs of items that are not among the `most_items`.
    held_out_again              a pair that is held out leaves train (the validation part of Gowalla lies in train), and
                                one of validation and test stays in test.
    users_without_history       users of validation or test with nothing in train: there is nothing to recommend by, so
                                their pairs are left out.
    users_who_saw_everything    no item is left to recommend, nor one to learn as a negative: their pairs are left out.
    items_not_in_train          held out all the same, since a system must rank them too; a miss for most models.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..goals import Ranking
from . import interactions
from .interactions import Interactions
from .parts import Pairs, histories
from .task import Task

__all__ = ["load"]

HELD_OUT, LEARNT = VALIDATION = ("held-out", "learnt")  # what is done with the validation part
SHORTEST = 5  # a user with fewer pairs gives none of them to validation or test
_Parts = dict[str, tuple[Tensor, Tensor]]


def load(
    root: Path | None,
    columns: Mapping[str, str] | None = None,
    min_rating: float | None = None,
    negatives: int = 1,
    seed: int = 0,
    most_items: int | None = None,
    validation: str = HELD_OUT,
) -> Task[Pairs]:
    """Read interactions (formats: see `interactions`) from `root`; None: the embedded MovieTweetings.

    Args:
        root: a folder, or one file.
        columns: names of the columns of a table, where they are not usual ones: user, item, rating, time.
        min_rating: ratings from it on count as chosen; 0 takes all but negative ones. None: 4 on a scale up to 5, 7 on
            one up to 10, 1 of 0 and 1 or of -1 and 1; other numbers, such as counts of plays, all count.
        negatives: items a user has not seen, drawn for each pair in training.
        seed: of the split, where the data has neither parts nor times.
        most_items: only so many items, those chosen most often; None: all.
        validation: "held-out", or "learnt": train has the pairs of validation, too. For the last training, by settings
            that were found with validation held out; scores of the validation part are then of learnt pairs.

    Where there are no parts, a tenth of each user's pairs (one at least) is test and as much before it validation, the
    latest by time; users with fewer than 5 give none. Where there is no validation part, a tenth of train is drawn.
    """
    if validation not in VALIDATION:
        raise ValueError(f"sparsekd.data: validation must be {' or '.join(VALIDATION)}, got {validation!r}")
    if root is None:
        embedded = resources.files(f"{__package__}.movietweetings").joinpath("ratings.dat.xz")
        with resources.as_file(embedded) as path:
            source, name = interactions.read(path, columns), "movietweetings"
    else:
        source, name = interactions.read(root, columns), root.name.partition(".")[0] or "interactions"
    least = source.likes if min_rating is None else min_rating
    kept, below = _rated(source.parts, least)
    rated_pairs = _count(kept)
    if most_items is not None:
        kept = _of_top_items(kept, most_items)
    if not _count(kept):
        cut = f"lower min_rating (--min-rating): {below:,} pairs are rated below {least:g}; or " if below else ""
        raise ValueError(f"sparsekd.data: no interaction is left; {cut}take another file")
    numbered, user_ids, item_ids = _numbered(kept, source.numbered and most_items is None)
    counts: dict[str, Any] = {
        "below_the_rating": below,
        "of_other_items": rated_pairs - _count(kept),
        **_count_duplicates(numbered, len(item_ids)),
    }
    coded, split = _split(kept, numbered, len(item_ids), seed)
    parts, left_out = _cleaned(coded, len(user_ids), len(item_ids))
    counts |= left_out
    _check_not_empty(name, parts, f"; {below:,} pairs rated below {least:g} do not count" if below else "")
    if validation == LEARNT:
        split += "; train has the pairs of validation, too"
    rated = "" if least is None else f"ratings of {least:g} and more; "
    return Task(
        name=f"ranking-{name}",
        **_pairs(parts, user_ids, item_ids, negatives, validation == LEARNT),
        goal=Ranking(),
        sizes={"users": len(user_ids), "items": len(item_ids)},
        mean=0.0,
        split=f"{rated}{split}",
        meta={
            "source": "embedded" if root is None else f"{root.name}, {source.kind}",
            "sha256": source.sha256,
            "split_sha256": _digest(parts),
            "validation": validation,
            "min_rating": least,
            "negatives": negatives,
            "pairs": {part: len(pairs[0]) for part, pairs in parts.items()},
            "users_judged": {part: len(parts[part][0].unique()) for part in ("val", "test")},
            **counts,
        },
    )


def _rated(parts: Mapping[str, Interactions], least: float | None) -> tuple[dict[str, Interactions], int]:
    """The parts without what is rated below `least`, and how many pairs that were."""
    if least is None:
        return dict(parts), 0
    kept = {name: log if log.ratings is None else log.take(log.ratings >= least) for name, log in parts.items()}
    return kept, _count(parts) - _count(kept)


def _count(parts: Mapping[str, Interactions]) -> int:
    return sum(map(len, parts.values()))


def _of_top_items(parts: Mapping[str, Interactions], count: int) -> dict[str, Interactions]:
    items, times = np.unique(np.concatenate([log.items for log in parts.values()]), return_counts=True)
    top = items[np.argsort(-times, kind="stable")[:count]]
    return {name: log.take(np.isin(log.items, top)) for name, log in parts.items()}


def _numbered(parts: Mapping[str, Interactions], as_they_are: bool) -> tuple[_Parts, np.ndarray, np.ndarray]:
    """Users and items of every part counted from 0, and the ids that the numbers stand for."""
    ids = []
    for column in ("users", "items"):
        values = np.concatenate([getattr(log, column) for log in parts.values()])
        ids.append(np.arange(int(values.max()) + 1) if as_they_are else np.unique(values))
    users, items = ids
    numbered = {
        name: tuple(
            torch.from_numpy(np.searchsorted(known, column).astype(np.int64))
            for known, column in ((users, log.users), (items, log.items))
        )
        for name, log in parts.items()
    }
    return numbered, users, items  # type: ignore[return-value]


def _count_duplicates(parts: _Parts, num_items: int) -> dict[str, int]:
    return {"duplicates": sum(len(u) - len(torch.unique(u * num_items + i)) for u, i in parts.values())}


def _split(logs: Mapping[str, Interactions], parts: _Parts, num_items: int, seed: int) -> tuple[dict[str, Tensor], str]:
    """Pairs of each part as one number, user * items + item, each once; and the rule in words."""
    coded = {name: users * num_items + items for name, (users, items) in parts.items()}
    if "all" in coded:
        order, first = _first_of_each(coded["all"], logs["all"].times)
        train, val, test = _by_user(order, first // num_items, seed)
        how = "the latest tenth" if logs["all"].times is not None else f"a random tenth (seed {seed})"
        return (
            {"train": first[train], "val": first[val], "test": first[test]},
            f"{how} of each user's pairs is test, as much before it validation; users of fewer than {SHORTEST} pairs "
            "are in train alone",
        )
    coded = {name: torch.unique(code) for name, code in coded.items()}
    if "val" in coded:
        return coded, "train, validation and test as the files have them"
    train, val, _ = _by_user(None, coded["train"] // num_items, seed, of_test=0)
    return (
        {"train": coded["train"][train], "val": coded["train"][val], "test": coded["test"]},
        f"train and test as the files have them; a random tenth (seed {seed}) of each user's train pairs is validation",
    )


def _first_of_each(coded: Tensor, times: np.ndarray | None) -> tuple[Tensor | None, Tensor]:
    """(times, pairs) of pairs that are there once, at the earliest of their times; in the order of their numbers."""
    if times is None:
        return None, torch.unique(coded)
    order = np.lexsort((times, coded.numpy()))
    sorted_codes = coded.numpy()[order]
    new = np.concatenate([[True], sorted_codes[1:] != sorted_codes[:-1]])
    return torch.from_numpy(times[order][new]), torch.from_numpy(sorted_codes[new])


def _by_user(times: Tensor | None, users: Tensor, seed: int, of_test: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Masks of train, validation and test over pairs [N] that are sorted by user."""
    # Equal times in a random order: otherwise the smaller item number would come first.
    shuffled = torch.rand(len(users), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    keys = (shuffled.numpy(), users.numpy()) if times is None else (shuffled.numpy(), times.numpy(), users.numpy())
    order = torch.from_numpy(np.lexsort(keys))
    counts = torch.bincount(users)
    begin = counts.cumsum(0) - counts
    from_end = torch.empty_like(users)
    from_end[order] = (begin + counts)[users[order]] - 1 - torch.arange(len(users))
    tenth = torch.where(counts >= SHORTEST, (counts / 10).round().clamp(min=1).long(), 0)[users]
    test = from_end < of_test * tenth
    val = (from_end < (1 + of_test) * tenth) & ~test
    return ~(test | val), val, test


def _cleaned(coded: Mapping[str, Tensor], num_users: int, num_items: int) -> tuple[_Parts, dict[str, int]]:
    """The parts by the rules of this module, and how many pairs and users fell to each."""
    train, val, test = (coded[name] for name in ("train", "val", "test"))
    again = torch.isin(val, test)
    held_train = torch.isin(train, torch.cat([val, test]))
    train, val = train[~held_train], val[~again]
    degree = torch.bincount(train // num_items, minlength=num_users)
    before_test = degree + torch.bincount(val // num_items, minlength=num_users)
    without, full, kept = set(), set(), {"train": train}
    full |= set((degree >= num_items).nonzero().flatten().tolist())
    for name, pairs, seen in (("val", val, degree), ("test", test, before_test)):
        users = pairs // num_items
        absent, all_seen = degree[users] == 0, seen[users] >= num_items
        without |= set(users[absent].tolist())
        full |= set(users[all_seen].tolist())
        kept[name] = pairs[~absent & ~all_seen]
    judged = torch.cat([kept["val"], kept["test"]]) % num_items
    return {name: (pairs // num_items, pairs % num_items) for name, pairs in kept.items()}, {
        "held_out_again": int(held_train.sum()) + int(again.sum()),
        "users_without_history": len(without),
        "users_who_saw_everything": len(full),
        "items_not_in_train": int((~torch.isin(judged.unique(), train % num_items)).sum()),
    }


def _check_not_empty(name: str, parts: _Parts, cut: str) -> None:
    for part, (users, _) in parts.items():
        if not len(users):
            raise ValueError(
                f"sparsekd.data: no pair is left in the {part} part of {name}: a user needs {SHORTEST} of them to give "
                f"any away{cut}; take more data, lower min_rating (--min-rating), or split it into train.txt, "
                "valid.txt and test.txt"
            )


def _pairs(
    parts: _Parts, user_ids: np.ndarray, item_ids: np.ndarray, negatives: int, all_learnt: bool
) -> dict[str, Pairs]:
    """Validation has seen train, test has seen both, and train the one or the other."""
    num_users, num_items = len(user_ids), len(item_ids)
    both = torch.cat([parts["train"][0], parts["val"][0]]), torch.cat([parts["train"][1], parts["val"][1]])
    of_train, of_both = (histories(*pairs, num_users, num_items) for pairs in (parts["train"], both))
    (users, items), seen = (both, of_both) if all_learnt else (parts["train"], of_train)
    can_learn = seen[0].diff()[users] < num_items
    train = Pairs(users[can_learn], items[can_learn], num_items, *seen, negatives, user_ids, item_ids)
    made = {"train": train}
    for name, (seen_offsets, seen_items) in (("val", of_train), ("test", of_both)):
        users, items = parts[name]
        made[name] = replace(train, users=users, items=items, seen_offsets=seen_offsets, seen_items=seen_items)
    return made


def _digest(parts: _Parts) -> str:
    """Of every pair of every part, in the order of numbers."""
    digest = hashlib.sha256()
    for name in ("train", "val", "test"):
        users, items = parts[name]
        order = np.lexsort((items.numpy(), users.numpy()))
        digest.update(name.encode() + torch.stack([users, items])[:, torch.from_numpy(order)].numpy().tobytes())
    return digest.hexdigest()
