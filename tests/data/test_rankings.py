"""Interactions become a task: numbers, splits, histories, and a count of everything that was left out."""

import numpy as np
import pytest
import torch

from sparsekd import data


def lightgcn(folder, train, test, valid=None):
    for name, rows in (("train.txt", train), ("test.txt", test), ("valid.txt", valid)):
        if rows is not None:
            (folder / name).write_text("\n".join(" ".join(map(str, row)) for row in rows) + "\n")
    return folder


def pairs(part):
    return sorted(zip(part.users.tolist(), part.items.tolist(), strict=True))


def history(part, user):
    return part.seen_items[part.seen_offsets[user] : part.seen_offsets[user + 1]].tolist()


def test_every_rule_is_counted(tmp_path):
    train = [[0, 1, 2, 2, 3], [1, 0, 1], [3, 0, 1, 2, 3, 4, 5]]  # user 2 is absent; user 3 has all but 6
    valid = [[0, 3, 4], [3, 6]]  # (0, 3) stands in train too
    test = [[0, 5, 4], [1, 6], [2, 1], [3, 6]]  # (0, 4) and (3, 6) in validation too; 6 is not in train
    task = data.load("rankings", lightgcn(tmp_path, train, test, valid))
    assert task.sizes == {"users": 4, "items": 7} and task.name == f"ranking-{tmp_path.name}"
    assert pairs(task.train) == [(0, 1), (0, 2), (1, 0), (1, 1), *((3, item) for item in range(6))]
    assert pairs(task.val) == [(0, 3)]
    assert pairs(task.test) == [(0, 4), (0, 5), (1, 6), (3, 6)]
    assert history(task.val, 0) == [1, 2] and history(task.test, 0) == [1, 2, 3]
    counts = {name: task.meta[name] for name in ("duplicates", "held_out_again", "users_without_history")}
    assert counts == {"duplicates": 1, "held_out_again": 3, "users_without_history": 1}
    assert task.meta["items_not_in_train"] == 1 and task.meta["users_who_saw_everything"] == 0
    assert task.meta["pairs"] == {"train": 10, "val": 1, "test": 4}
    assert task.meta["users_judged"] == {"val": 1, "test": 3}


def test_users_who_saw_everything_are_not_judged(tmp_path):
    task = data.load("rankings", lightgcn(tmp_path, [[0, 0, 1, 2], [1, 0]], [[1, 1]], [[1, 2]]))
    assert task.meta["users_who_saw_everything"] == 1 and pairs(task.test) == [(1, 1)]
    assert pairs(task.train) == [(1, 0)] and history(task.train, 0) == [0, 1, 2]


def test_validation_may_be_learnt(tmp_path):
    folder = lightgcn(tmp_path, [[0, 1, 2], [1, 0, 1]], [[0, 4], [1, 3]], [[0, 3], [1, 2]])
    held_out, learnt = (data.load("rankings", folder, validation=name) for name in ("held-out", "learnt"))
    assert pairs(learnt.train) == [(0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2)]
    assert history(learnt.train, 0) == [1, 2, 3] and history(learnt.val, 0) == [1, 2]
    for part in ("val", "test"):
        before, now = getattr(held_out, part), getattr(learnt, part)
        assert pairs(now) == pairs(before) and torch.equal(now.seen_items, before.seen_items)
    assert len(held_out.train) == 4 and "validation, too" in learnt.split and learnt.meta["validation"] == "learnt"
    assert learnt.meta["split_sha256"] == held_out.meta["split_sha256"]  # of the parts as they are divided
    with pytest.raises(ValueError, match="validation must be held-out or learnt, got 'used'"):
        data.load("rankings", folder, validation="used")


def test_the_hash_is_of_the_pairs_not_of_their_order(tmp_path):
    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        folder.mkdir()
    parts = ([[1, 3, 0], [0, 1]], [[0, 2]], [[1, 1]])
    hashes = [data.load("rankings", lightgcn(folders[0], *parts)).meta["split_sha256"]]
    hashes.append(data.load("rankings", lightgcn(folders[1], [[0, 1], [1, 0, 3]], *parts[1:])).meta["split_sha256"])
    hashes.append(data.load("rankings", lightgcn(folders[2], parts[0], [[0, 3]], parts[2])).meta["split_sha256"])
    assert hashes[0] == hashes[1] != hashes[2]


def table(folder, rows, heading="user,item,rating,timestamp"):
    path = folder / "shop.csv"
    path.write_text("\n".join([heading, *(",".join(map(str, row)) for row in rows)]) + "\n")
    return path


def test_the_latest_of_each_user_are_held_out(tmp_path):
    rows = [("ann", f"i{time}", 5, time) for time in range(20)]
    rows += [("bob", f"i{time}", 5, 100 - time) for time in range(6)]
    rows += [("eve", f"i{time}", 5, time) for time in range(4)]  # too few to give any away
    rows += [("ann", "i19", 5, 3), ("ann", "i99", 1, 50)]  # again, earlier; and not liked
    task = data.load("rankings", table(tmp_path, rows))
    names = [
        {(part.user_ids[user], part.item_ids[item]) for user, item in pairs(part)} for part in (task.val, task.test)
    ]
    assert names[1] == {("ann", "i18"), ("ann", "i17"), ("bob", "i0")}  # i19 was chosen at 3
    assert names[0] == {("ann", "i16"), ("ann", "i15"), ("bob", "i1")}
    assert "ratings of 4 and more; the latest tenth" in task.split
    assert task.meta["below_the_rating"] == 1 and task.meta["duplicates"] == 1 and task.sizes["items"] == 20
    everything = data.load("rankings", table(tmp_path, rows), min_rating=0)
    assert everything.sizes["items"] == 21 and everything.meta["below_the_rating"] == 0


def test_without_times_the_split_is_drawn_by_its_seed(tmp_path):
    rows = [(user, item) for user in range(8) for item in range(user, user + 12)]
    tasks = [data.load("rankings", table(tmp_path, rows, "user,item"), seed=seed) for seed in (0, 0, 1)]
    assert tasks[0].meta["split_sha256"] == tasks[1].meta["split_sha256"] != tasks[2].meta["split_sha256"]
    assert [len(part) for part in (tasks[0].train, tasks[0].val, tasks[0].test)] == [80, 8, 8]
    assert "a random tenth (seed 0)" in tasks[0].split
    assert not set(pairs(tasks[0].train)) & set(pairs(tasks[0].test))


def test_a_split_without_validation_gives_a_tenth_of_train(tmp_path):
    task = data.load("rankings", lightgcn(tmp_path, [[0, *range(10)], [1, 0, 1]], [[0, 11], [1, 11]]))
    assert [len(part) for part in (task.train, task.val, task.test)] == [11, 1, 2]
    assert "of each user's train pairs is validation" in task.split


def test_what_leaves_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no pair is left in the val part of shop: a user needs 5"):
        data.load("rankings", table(tmp_path, [("a", "b", 5, 1), ("a", "c", 5, 2)]))
    with pytest.raises(ValueError, match="no interaction is left; lower min_rating"):
        data.load("rankings", table(tmp_path, [("a", "b", 1, 1), ("a", "c", 5, 2)]), min_rating=6)


def test_movietweetings_ships_with_sparsekd():
    task = data.load("rankings")
    assert task.sizes == {"users": 15_213, "items": 8_259} and task.name == "ranking-movietweetings"
    assert task.meta["pairs"] == {"train": 60_601, "val": 6_085, "test": 6_085}
    assert task.meta["split_sha256"].startswith("5aa1973e59890b74")
    users, items, negatives = task.train.examples(3)
    assert negatives.shape == (3, 1) and users.dtype == items.dtype == torch.int64
    assert np.issubdtype(task.train.user_ids.dtype, np.integer)
