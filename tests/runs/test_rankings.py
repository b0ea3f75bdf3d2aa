"""The task of rankings in runs: baselines against tables by hand, equal bytes, a small run and its resumption."""

import json

import numpy as np
import pytest
import torch

from sparsekd import checkpoint, data, methods, models, optim, report, runs
from sparsekd.data import Pairs, Task, histories
from sparsekd.distill import Plain
from sparsekd.goals import Ranking
from sparsekd.methods.tables import bytes_of
from sparsekd.runs import RunConfig, learners, neighbours, record, state, tasks
from sparsekd.runs.plans import rankings
from sparsekd.runs.plans.network import RANKING_METHODS_ALL
from sparsekd.runs.runtime import Runtime
from sparsekd.runs.steps import Rate, Stepper


def part(chosen, seen, num_items=6):
    users, items = (torch.tensor(column) for column in zip(*chosen, strict=True))
    return Pairs(users, items, num_items, *histories(*(torch.tensor(c) for c in zip(*seen, strict=True)), 4, num_items))


TRAIN = [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 3), (2, 4), (3, 3)]


def small_task():
    train, val, test = part(TRAIN, TRAIN), part([(0, 2)], TRAIN), part([(3, 4), (0, 2)], TRAIN)
    return Task("small", train, val, test, Ranking((1, 2)), {"users": 4, "items": 6}, 0.0, "by hand", {})


def test_popularity_and_neighbours_by_hand():
    task = small_task()
    # Chosen 2 2 1 2 1 0 times: user 3 (saw 3) gets 0, 1; user 0 (saw 0, 1) gets 3, 2.
    scores, _ = neighbours.popular(task)
    assert scores["recall@1"] == 0 and scores["recall@2"] == 0.5
    scores, setting = neighbours.item_knn(task)
    assert scores["recall@1"] == scores["hr@1"] == 1 and setting.endswith("neighbours")


def test_ease_solves_its_least_squares():
    task = small_task()
    together = neighbours._together(task.train)
    dense = torch.zeros(4, 6)
    for user, item in TRAIN:
        dense[user, item] = 1
    assert torch.equal(together, dense.T @ dense)
    weights = neighbours._weights(together, 2.0)
    assert bool((weights.diagonal() == 0).all())
    for item in range(6):  # ridge regression of each column on the others
        others = [other for other in range(6) if other != item]
        x = dense[:, others].double()
        want = torch.linalg.solve(x.T @ x + 2 * torch.eye(5, dtype=torch.float64), x.T @ dense[:, item].double())
        torch.testing.assert_close(weights[others, item].double(), want, rtol=1e-4, atol=1e-5)


def test_too_many_items_are_said_not_left_out(monkeypatch):
    monkeypatch.setattr(neighbours, "MOST_ITEMS", 5)
    for of in (neighbours.ease, neighbours.item_knn):
        scores, setting = of(small_task())
        assert scores == {} and setting.startswith("not run: more than")


@pytest.mark.parametrize("density", [0.2, 0.1, 0.05])
def test_the_smaller_model_takes_no_more_bytes(density):
    sizes = {"users": 640, "items": 1280}
    packed = models.MF(sizes, rankings.DIM, density)
    budget = bytes_of([packed.users, packed.items])
    rows, dim = 1920, rankings.small_dim(density)
    assert 4 * rows * dim <= budget < 4 * rows * (dim + 1)


def planned(methods=RANKING_METHODS_ALL, **options):
    config = tasks.complete(RunConfig("sparserec", methods=methods, quick=True, densities=(0.2, 0.1), **options))
    return rankings.of_rankings(small_task(), config)


def test_every_method_has_its_networks_and_they_start_alike():
    plan = planned()
    folders = [network.folder for network in plan.students]
    assert len(set(folders)) == len(folders) == 2 * (len(RANKING_METHODS_ALL) - 1) + 1
    (imp,) = (network for network in plan.students if network.folder == "imp")
    assert imp.densities == (0.2, 0.1) and imp.recipe.epochs == sum(epochs for _, epochs in imp.options["rounds"])
    full = {network.folder: record.fresh(network, 0) for network in plan.students if network.method != "sparserec"}
    assert torch.equal(full["imp"].users.rows(), full["one-shot-0.1"].users.rows())
    json.dumps([network.settings() for network in plan.students])


def test_of_very_many_users_some_choose_the_epoch(monkeypatch):
    config = tasks.complete(RunConfig("sparserec", quick=True))
    whole = rankings.load(config)
    assert whole.meta["users_judged"]["val"] == len(whole.val.users.unique()) > 50
    monkeypatch.setattr(rankings, "MOST_SCORED", 50 * whole.sizes["items"] + 1)
    task = rankings.load(config)
    chosen = task.val.users.unique()
    assert task.meta["users_judged"] == {"val": 50, "test": len(whole.test.users.unique())} and len(chosen) == 50
    pairs = {(u, i) for u, i in zip(whole.val.users.tolist(), whole.val.items.tolist(), strict=True) if u in chosen}
    assert set(zip(task.val.users.tolist(), task.val.items.tolist(), strict=True)) == pairs
    assert task.meta["split_sha256"] == whole.meta["split_sha256"] and len(task.train) == len(whole.train)


def test_a_call_may_set_how_all_networks_learn():
    plan = planned(options={"lr": "1e-3", "weight_decay": 0.25, "epochs": "4", "batch_size": "64"})
    recipes = [network.recipe for network in (plan.teacher, *plan.students)]
    assert {(recipe.lr, recipe.batch_size) for recipe in recipes} == {(1e-3, 64)}
    # The other one has no decay of AdamW's kind.
    assert [recipe.weight_decay for recipe in recipes if recipe.weight_decay != 0.25] == [1e-5, 1e-5]
    assert plan.teacher.recipe.epochs == 4
    assert "lr" not in tasks.complete(RunConfig("sparserec")).options
    assert planned().teacher.recipe.lr == rankings.RECIPE.lr


def test_a_call_may_set_what_pairs_are_learnt_and_compared_with():
    config = {"options": {"negatives": "3"}, "quick": True}
    task = rankings.load(tasks.complete(RunConfig("sparserec", **config)))
    assert next(iter(task.train.batches(8)))[0][2].shape == (8, 3)
    assert task.goal.baselines == ("popular", "item_knn", "ease")
    plan = planned(options={"validation": "learnt", "epochs": 2})
    about = record.settings_of_task(task, plan, RunConfig("sparserec"))
    assert about["negatives"] == 3 and "negatives" not in record.settings_of_task(small_task(), plan, RunConfig("x"))


def test_a_table_of_ones_own_is_read_by_options_and_what_was_left_out_is_said(tmp_path):
    rows = [f"{item},u{user},{1 + (user + item) % 5},2020-01-{item + 1:02}" for user in range(12) for item in range(12)]
    path = tmp_path / "shop.csv"
    path.write_text("\n".join(["sku,client,marks,day", *rows, rows[-1]]))
    options = {"user": "client", "item": "sku", "rating": "marks", "time": "day"}

    def loaded(**more):
        return rankings.load(tasks.complete(RunConfig("sparserec", str(path), {**options, **more})))

    everything, liked = loaded(min_rating="0"), loaded()
    said = rankings.describe(everything)
    assert said.startswith("ranking-shop: 12 users, 12 items; ")
    assert said.endswith("of test. Left out: pairs that are there twice: 1")
    assert "pairs rated below 4 (--min-rating): 8" in rankings.describe(liked)
    # Of another split nothing is gone on with.
    about = [record.settings_of_task(task, planned(), RunConfig("sparserec")) for task in (everything, liked)]
    assert about[0]["split"] == everything.meta["split_sha256"] != about[1]["split"]
    with pytest.raises(ValueError, match="user must be a text, got 3"):
        tasks.complete(RunConfig("sparserec", options={"user": 3}))


@pytest.mark.parametrize(
    ("given", "flag"),
    [
        ({"budgets": ("bytes=0.1",)}, "--budget"),
        ({"unit": "bytes"}, "--unit"),
        ({"scope": "layer"}, "--scope"),
        ({"pattern": "4x4"}, "--pattern"),
        ({"at_once": "magnitude"}, "--at-once"),
    ],
)
def test_what_is_about_blocks_is_refused(given, flag):
    with pytest.raises(ValueError, match=f"keeps shares of the entries of tables, .*; leave out {flag}, which"):
        tasks.complete(RunConfig("sparserec", **given))


def test_a_density_that_leaves_rows_empty_is_refused_before_anything_is_trained():
    with pytest.raises(ValueError, match=r"one of its 64 entries, got 0.01; give 0.015625 or more"):
        tasks.plan_of(small_task(), tasks.complete(RunConfig("sparserec", densities=(0.01,))))


def test_learnt_validation_chooses_nothing():
    learnt = {"validation": "learnt", "epochs": 2}
    with pytest.raises(ValueError, match="nothing chooses the epoch; give epochs"):
        rankings.load(tasks.complete(RunConfig("sparserec", quick=True, options={"validation": "learnt"})))
    task = rankings.load(tasks.complete(RunConfig("sparserec", quick=True, options=learnt)))
    assert task.goal.baselines == ("popular",) and len(task.train) > task.meta["pairs"]["train"]
    plan = planned(options=learnt)
    assert {network.recipe.select for network in (plan.teacher, *plan.students)} == {"last"}
    assert plan.about["selection"].startswith("last epoch") and planned().teacher.recipe.select == "best"
    folder = tasks.folder_of(tasks.complete(RunConfig("sparserec", quick=True, options=learnt)), task)
    assert folder.name == "ranking-movietweetings-learnt-quick"


def test_one_ablation_moves_the_rows_of_a_batch_alone():
    plan = planned(("sparserec", "sparserec-adam"))
    usual, ours = (
        next(n for n in plan.students if n.folder == f"{name}-0.1") for name in ("sparserec", "sparserec-adam")
    )
    assert usual.recipe.optimizer == "adamw" and ours.recipe.optimizer == "sparse-adam"
    assert (
        usual.options["exchanged"] == rankings.EXCHANGED
        and usual.options == ours.options
        and ours.name == "SparseRec, adam"
    )
    network = Stepper(learners.learner_of(record.fresh(ours, 0), small_task(), ours, None, 0), "sparse-adam", Runtime())
    assert isinstance(network.optimizer, optim.SparseAdam)
    before = [table.values.detach().clone() for table in network.method.tables]
    chosen = small_task().train.batches(3, torch.Generator().manual_seed(0))
    network.learn([next(chosen)], lambda step: Rate(0.1, 0.1))
    for table, then in zip(network.method.tables, before, strict=True):
        changed = table.values != then
        assert changed.any() and not changed.all()  # by AdamW's decay all of them would


@pytest.mark.parametrize("kind", ["neumf", "lightgcn"])
def test_what_trains_more_than_rows_of_a_batch_is_refused(kind):
    with pytest.raises(ValueError, match=f"got {kind}, which trains more; take --model mf"):
        planned(("sparserec-adam",), options={"model": kind})


def test_sparse_adam_of_a_network_beside_tables_is_refused():
    model = models.NeuMF({"users": 4, "items": 6}, 8, 0.5, sparse=True)
    method = methods.Method(Plain(model, Ranking()))
    with pytest.raises(
        ValueError, match="got 6 other parameters beside those of NeuMF; take adamw, and make the model"
    ):
        Stepper(method, "sparse-adam", Runtime())


@pytest.mark.parametrize("name", ["negatives", "exchanged"])
def test_rows_under_other_settings_are_not_taken(name, tmp_path):
    """Also those from before there was the setting."""
    now = {"task": "ranking", "seed": 0, "folder": "sparserec-0.1", "options": {"exchanged": 0.1}, "negatives": 8}
    then = json.loads(json.dumps(now))
    del (then if name == "negatives" else then["options"])[name]
    for first, second in ((then, now), (now, then)):
        with pytest.raises(ValueError, match=r"is of another run: its (negatives|options) is"):
            state.check_same_settings(tmp_path, first, second)
    state.check_same_settings(tmp_path, now, now)


def test_methods_of_other_tasks_are_refused():
    with pytest.raises(ValueError, match=r"sparserec is trained by small, .*, got 'sp-sad'"):
        tasks.complete(RunConfig("sparserec", methods=("sp-sad",)))
    with pytest.raises(ValueError, match=r"cifar100 is trained by .*, got 'imp'"):
        tasks.complete(RunConfig("cifar100", methods=("imp",)))


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(rankings, "DIM", 16)
    monkeypatch.setattr(rankings, "QUICK", {"most_items": 40})
    monkeypatch.setattr(rankings, "QUICK_RECIPE", {"epochs": 2, "batch_size": 512})


def test_a_run_writes_its_report_and_goes_on_where_it_stopped(tiny, tmp_path, monkeypatch):
    config = {"task": "sparserec", "quick": True, "densities": (0.25,), "out": str(tmp_path)}
    results, folder = runs.run(RunConfig(methods=("sparserec", "imp"), **config), say=lambda line: None)
    rows = {row["name"]: row for row in results["rows"]}
    assert set(rows) == {"dense", "SparseRec", "IMP"}
    for name in ("SparseRec", "IMP"):
        assert rows[name]["metrics"]["weights_kept"] == pytest.approx(0.25, abs=1e-3)
        assert rows[name]["target_density"] == 0.25 and rows[name]["metrics"]["latency_ms_frozen"] > 0
    assert {score["name"] for score in results["baselines"]} == {"popularity", "ItemKNN", "EASE"}
    assert results["task"]["split_sha256"] and results["task"]["pairs"]["test"] > 0
    page = (folder / "report.html").read_text()
    assert "NDCG@20" in page and "SparseRec" in page
    written = (folder / "report.md").read_text()
    for text in (page, written):  # nothing was distilled or frozen, and there are no multiply-adds to save
        assert "tables of recommenders, dense and sparse" in text and "multiply-adds" not in text
    for name in ("popular", "item_knn", "ease"):
        monkeypatch.setattr(neighbours, name, lambda task: pytest.fail("what needs no network is computed once"))
    again, _ = runs.run(
        RunConfig(methods=("sparserec", "imp"), **config),
        say=lambda line: line.startswith("ranking-") or pytest.fail(line),
    )
    assert [row["metrics"] for row in again["rows"]] == [row["metrics"] for row in results["rows"]]
    assert again["baselines"] == results["baselines"]
    with pytest.raises(runs.OutOfTime):
        runs.run(RunConfig(methods=("pep",), stop_after=1e-9, **config), say=lambda line: None)
    results, _ = runs.run(RunConfig(methods=("pep", "sparserec-kd"), **config), say=lambda line: None)
    assert {row["name"] for row in results["rows"]} == {"dense", "SparseRec", "IMP", "PEP", "SparseRec, kd"}
    (taught,) = (row for row in results["rows"] if row["name"] == "SparseRec, kd")
    assert all(epoch["kd"] > 0 for epoch in taught["epochs"]) and taught["settings"]["alpha"] == 1
    assert "PEP" in report.result_tables(results)


def test_a_sparse_file_is_read_into_a_dense_model_and_back(tmp_path):
    sizes = {"users": 5, "items": 7}
    sparse, dense = models.MF(sizes, 8, 0.3), models.MF(sizes, 8)
    checkpoint.save(sparse, tmp_path / "sparse")
    checkpoint.save(dense, tmp_path / "dense")
    loaded = checkpoint.load(models.MF(sizes, 8), tmp_path / "sparse")
    assert torch.equal(loaded.users.rows(), sparse.users.rows()) and torch.equal(loaded.users.kept, sparse.users.kept)
    loaded = checkpoint.load(models.MF(sizes, 8, 0.5), tmp_path / "sparse")
    assert torch.equal(loaded.items.rows(), sparse.items.rows())
    loaded = checkpoint.load(models.MF(sizes, 8, 0.5), tmp_path / "dense")
    assert isinstance(loaded.users, torch.nn.Embedding) and torch.equal(loaded.users.weight, dense.users.weight)
    with pytest.raises(ValueError, match=r"users.weight is \[5, 8\] in the file and \[6, 8\]"):
        checkpoint.load(models.MF({"users": 6, "items": 7}, 8), tmp_path / "sparse")


def test_only_the_items_chosen_most_are_kept():
    task = data.load("rankings", most_items=50)
    assert task.sizes["items"] == 50 and len(np.unique(task.train.item_ids)) == 50
