"""What a served file answers: as the model does, by popularity where there is no row, and never from a neighbour's."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sparsekd import cli, models, recommend
from sparsekd.data import Pairs, Task, histories
from sparsekd.goals import Ranking

SIZES = {"users": 5, "items": 8}
TRAIN = torch.tensor([[0, 0], [0, 1], [1, 1], [1, 2], [2, 1], [2, 3], [3, 4]])  # user 4 and items 5..7: nothing
VAL, TEST = torch.tensor([[0, 2]]), torch.tensor([[0, 3], [1, 6]])


def task(users=("ann", "bob", "eve", "joe", "zoë"), items=(10, 20, 30, 40, 50, 60, 70, 80)):
    def part(pairs, seen):
        sizes = (5, 8)
        return Pairs(*pairs.T, 8, *histories(*seen.T, *sizes), user_ids=np.array(users), item_ids=np.array(items))

    parts = part(TRAIN, TRAIN), part(VAL, TRAIN), part(TEST, torch.cat([TRAIN, VAL]))
    return Task("shop", *parts, Ranking(), SIZES, 0.0, "by hand", {})


def made(kind="mf", density=0.5):
    torch.manual_seed(0)
    if kind == "lightgcn":
        return models.LightGCN(SIZES, tuple(TRAIN.T), 6, density)
    return models.MF(SIZES, 6, density)


@pytest.mark.parametrize(("kind", "density"), [("mf", 0.5), ("mf", None), ("lightgcn", 0.5)])
def test_known_users_get_what_the_model_scores_best(tmp_path, kind, density):
    model = made(kind, density)
    recommend.save(model, task(), tmp_path / "file")
    served = recommend.Served(tmp_path / "file")
    assert (served.num_users, served.num_items) == (5, 8)
    with torch.no_grad():
        scores = model.score_items(torch.arange(5))
    chosen = {0: {0, 1, 2, 3}, 1: {1, 2, 6}, 2: {1, 3}, 3: {4}}
    for user, name in enumerate(("ann", "bob", "eve", "joe")):
        answer = served.best(name, 8)
        left = [item for item in range(5) if item not in chosen[user]]  # of those that somebody chose in training
        want = sorted(left, key=lambda item: -scores[user, item])
        assert answer.items == [str(10 * (item + 1)) for item in want] and answer.rule == recommend.BY_ROWS
        np.testing.assert_allclose(answer.scores, scores[user, want], rtol=1e-5, atol=1e-6)
        assert served.best(name, 1).items == answer.items[:1]


def test_users_without_history_get_what_most_chose(tmp_path):
    recommend.save(made(), task(), tmp_path / "file")
    served = recommend.Served(tmp_path / "file")
    for name, rule in (("zoë", recommend.BY_POPULARITY), ("nobody", recommend.NOT_KNOWN), (4711, recommend.NOT_KNOWN)):
        answer = served.best(name, 3)
        assert answer.items == ["20", "10", "30"] and answer.scores == [3, 1, 1]
        assert answer.rule == rule


@pytest.mark.parametrize("users", [(7, 8, 9, 30, 200), ("7", "08", "9", "a" * 40, "é")])
def test_ids_are_those_of_the_source(tmp_path, users):
    if isinstance(users[0], str):
        users = tuple(sorted(users))
    recommend.save(made(), task(users=users), tmp_path / "file")
    served = recommend.Served(tmp_path / "file")
    for number, name in enumerate(users[:4]):
        assert served._users.number(str(name)) == number and served.best(str(name)).rule == recommend.BY_ROWS
    for stranger in ("10", "-1", "201", "8.0", "x", "99999999999999999999"):
        assert served._users.number(stranger) is None


def test_the_file_is_mapped_not_read(tmp_path):
    rows = 200_000
    sizes = {"users": rows, "items": 4}
    pairs = torch.tensor([[0, 0], [rows - 1, 1]])
    ids = {"user_ids": np.arange(rows), "item_ids": np.arange(4)}
    part = Pairs(*pairs.T, 4, *histories(*pairs.T, rows, 4), **ids)
    shop = Task("shop", part, part, part, Ranking(), sizes, 0.0, "by hand", {})
    recommend.save(models.MF(sizes, 64, 0.5), shop, tmp_path / "file")
    size = (tmp_path / "file").stat().st_size
    assert size > 25e6

    def anonymous_bytes():
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])

    if not os.path.exists("/proc/self/status"):
        pytest.skip("needs /proc")
    recommend.Served(tmp_path / "file").best("0", 1)
    before = anonymous_bytes()
    served = recommend.Served(tmp_path / "file")
    assert served.best(str(rows - 1), 1).items == ["0"]
    assert anonymous_bytes() - before < size / 10


def test_files_that_are_foreign_or_cut_short(tmp_path):
    path = tmp_path / "file"
    with pytest.raises(FileNotFoundError, match="does not exist"):
        recommend.Served(path)
    recommend.save(made(), task(), path)
    whole = path.read_bytes()
    for length in (0, 5, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="corrupt or cut short"):
            recommend.Served(path)
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="got a file of another program"):
        recommend.Served(path)


def test_what_cannot_be_served_is_refused(tmp_path):
    with pytest.raises(TypeError, match="expected a model whose score is a product of rows"):
        recommend.save(models.NeuMF(SIZES, 6), task(), tmp_path / "file")
    recommend.save(made(), task(), tmp_path / "file")
    with pytest.raises(ValueError, match="top must be a whole number from 1 on, got 0"):
        recommend.Served(tmp_path / "file").best("ann", 0)
    with pytest.raises(ValueError, match=r"whole number from 1 on, got 2\.5"):
        recommend.Served(tmp_path / "file").best("ann", 2.5)


class _Biased(models.MF):
    def score_items(self, users):
        return super().score_items(users) + torch.arange(8)


def test_a_score_of_its_own_other_sizes_and_nan_are_refused(tmp_path):
    lost = made()
    with torch.no_grad():
        lost.items.values[3] = float("nan")
    for error, message, model in (
        (TypeError, "got _Biased with a score_items of its own", _Biased(SIZES, 6)),
        (ValueError, "the task has 5 users, .* got 8", models.MF({"users": 8, "items": 5}, 6)),
        (ValueError, "the task has 8 items, .* got 9", models.MF({"users": 5, "items": 9}, 6)),
        (ValueError, "rows of items must be finite", lost),
    ):
        with pytest.raises(error, match=message):
            recommend.save(model, task(), tmp_path / "file")
    assert not list(tmp_path.iterdir())


def test_more_than_there_are_takes_no_memory_for_them(tmp_path):
    recommend.save(made(), task(), tmp_path / "file")
    served = recommend.Served(tmp_path / "file")
    assert served.best("ann", 10**12) == served.best("ann", 8)


def test_the_command(tmp_path, capsys):
    path = str(tmp_path / "file")
    recommend.save(made(), task(), path)
    assert cli.main(["recommend", "--model", path, "--user", "zoë", "--top", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"user zoë: {recommend.BY_POPULARITY}", "20\t3", "10\t1"]
    assert cli.main(["recommend", "--model", path + "x", "--user", "zoë"]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert cli.main(["recommend", "--model", str(tmp_path), "--user", "zoë"]) == 2
    assert "is a folder; give a file" in capsys.readouterr().err
