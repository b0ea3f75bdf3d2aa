"""Rankings: recommenders over dense tables, and at equal bytes over tables that SparseRec and its rivals made sparse.

The teacher is the dense model, and its row is that of "dense"; students of `sparserec-kd` learn its scores.

    small            fewer dimensions for every row, as many as the bytes of the packed table allow
    random-mask      a random mask that stays
    one-shot         trained dense, the largest entries kept, trained again from the same start
    imp              the same in many rounds, a tenth of the entries at once
    rigl             dynamic, random start, growth by the gradient of the last batch (RigL; DSL for recommenders)
    pep              learnt thresholds, then trained again from the same start
    sparserec        SparseRec; -random starts from random masks, -normal from random values, -static keeps its masks,
                     -last grows by the last batch alone, -absolute by sums of magnitudes, -sampled learns half of the
                     rows of a batch, -kd the teacher's scores too, and -adam by `sparsekd.optim.SparseAdam`: no row
                     moves or decays but those of the batch
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from ... import data, models
from ...data import Task
from ...data.rankings import LEARNT
from ...goals import Ranking
from ...methods.tickets import imp_rounds
from ..config import RunConfig
from .network import Network, Plan
from .recipe import Recipe

MODELS = ("mf", "neumf", "lightgcn")
DIM = 64
NEGATIVES = 8  # of each pair: with one, dense MF has a sixth less NDCG@20 on the validation parts of lastfm and ml-1m
# Found on these two with dense MF; all models and methods learn alike. The rate is constant, so that every round of a
# ticket is trained as the others; the epoch is chosen on the validation part.
RECIPE = Recipe(lr=1e-2, weight_decay=0.5, epochs=20, batch_size=8192, milestones=(), select="best", recalibrate=False)
RECIPES = {
    "mf": RECIPE,
    # Not searched: that of its paper's code, with a higher rate for the larger batch. The decay that tables want would
    # take the small network away, since it is of all weights alike.
    "neumf": dataclasses.replace(RECIPE, lr=5e-3, weight_decay=1e-2),
    "lightgcn": dataclasses.replace(RECIPE, weight_decay=0.1),  # found on lastfm
}
# In place of AdamW's decay of all rows in every step: a part of the gradient, of the rows of a batch. Found on lastfm
# among 0 and 1e-6 to 1e-4.
BY_ROWS: dict[str, Any] = {"optimizer": "sparse-adam", "weight_decay": 1e-5}
OF_DATA = ("negatives", "validation", "min_rating")
# Options that name a column of a table, and whose it is.
COLUMNS = {"user": "the user", "item": "the item", "rating": "the rating", "time": "the time"}
OF_RECIPE = ("lr", "weight_decay", "epochs", "batch_size")  # what a call may set instead, as found for its data
IMP: dict[str, Any] = {"epochs": 5, "removed": 0.1}  # of a round that only looks for the next mask
QUICK: dict[str, Any] = {"most_items": 300}
QUICK_RECIPE: dict[str, Any] = {"epochs": 3, "batch_size": 1024}
QUICK_EVERY = 4
QUICK_IMP: dict[str, Any] = {"epochs": 1, "removed": 0.5}
_SELECTION = "epoch of the best validation NDCG@20 at the final density; the test part is used once, for that epoch"
_SELECTION_LEARNT = "last epoch, since validation is learnt, too: its scores are of learnt pairs"
MOST_SCORED = 100_000_000  # scores of users and items that a validation ranks: some seconds of a core
EVERY = 50  # steps between two exchanges
EXCHANGED = 0.1  # share of the entries that the first exchange drops
SWITCHES: dict[str, dict[str, Any]] = {
    "sparserec": {},
    "sparserec-kd": {},
    "sparserec-adam": {},
    "sparserec-random": {"init": "random"},
    "sparserec-normal": {"values": "normal"},
    "sparserec-static": {"exchanged": 0.0},
    "sparserec-last": {"accumulate": "last"},
    "sparserec-absolute": {"accumulate": "absolute"},
    "sparserec-sampled": {"sample": 0.5},
    # Its own share: on ml-1m, validation prefers 0.3 for a random start and 0.1 for that of the factorisation.
    "rigl": {"init": "random", "accumulate": "last", "exchanged": 0.3},
    "random-mask": {"init": "random", "exchanged": 0.0},
}


def load(config: RunConfig) -> Task:
    """Who chose what in the folder of the run, or in MovieTweetings; a quick run has the top items alone."""
    learnt = _learns_validation(config)
    if learnt and "epochs" not in config.options:
        raise ValueError(
            "sparsekd run: with validation learnt nothing chooses the epoch; give epochs, as many as a run with "
            "validation held-out found"
        )
    options: dict[str, Any] = {"negatives": NEGATIVES, **(QUICK if config.quick else {})}
    options |= {name: config.options[name] for name in OF_DATA if name in config.options}
    columns = {name: config.options[name] for name in COLUMNS if name in config.options}
    task = data.load("rankings", config.data_dir, columns=columns, **options)
    task = _validated_on_some(task)
    return dataclasses.replace(task, goal=_NothingToChoose()) if learnt else task


def describe(task: Task) -> str:
    """What was read and what was left out, in a line."""
    meta, pairs = task.meta, task.meta["pairs"]
    counts = {
        f"pairs rated below {meta['min_rating'] or 0:g} (--min-rating)": meta["below_the_rating"],
        "pairs of items chosen less often": meta["of_other_items"],
        "pairs that are there twice": meta["duplicates"],
        "pairs of train that are held out": meta["held_out_again"],
        "users without history": meta["users_without_history"],
        "users who saw everything": meta["users_who_saw_everything"],
    }
    left_out = ", ".join(f"{why}: {count:,}" for why, count in counts.items() if count)
    return (
        f"{task.name}: {task.sizes['users']:,} users, {task.sizes['items']:,} items; {pairs['train']:,} pairs to learn "
        f"from, {pairs['val']:,} of validation, {pairs['test']:,} of test. Left out: {left_out or 'none'}"
    )


def _check_leaves_every_row(densities: Sequence[float]) -> None:
    """As the tables do, before anything is trained."""
    for density in densities:
        if density * DIM < 1:
            raise ValueError(
                f"sparsekd run: a density must leave every row one of its {DIM} entries, got {density:g}; give "
                f"{1 / DIM:g} or more"
            )


def _learns_validation(config: RunConfig) -> bool:
    return config.options["validation"] == LEARNT


class _NothingToChoose(Ranking):
    """Without the references whose settings validation chooses."""

    baselines = ("popular",)


def _validated_on_some(task: Task) -> Task:
    """The task with so many users in its validation part, drawn at random, that it has MOST_SCORED scores; `meta` says
    how many. To rank all items for more of them would take longer, after every epoch, than the epoch."""
    users, most = task.val.users.unique(), max(1, MOST_SCORED // task.sizes["items"])
    if len(users) <= most:
        return task
    some = users[torch.randperm(len(users), generator=torch.Generator().manual_seed(0))[:most]]
    mine = torch.isin(task.val.users, some)
    val = dataclasses.replace(task.val, users=task.val.users[mine], items=task.val.items[mine])
    judged = {**task.meta["users_judged"], "val": len(some)}
    return dataclasses.replace(task, val=val, meta={**task.meta, "users_judged": judged})


def of_rankings(task: Task, config: RunConfig) -> Plan:
    kind = config.options["model"]
    more = QUICK_RECIPE if config.quick else {"batch_size": batch_for(_train_pairs(task))}
    own = {name: config.options[name] for name in OF_RECIPE if name in config.options}
    learnt = _learns_validation(config)
    _check_leaves_every_row(config.densities or ())
    recipe = dataclasses.replace(RECIPES[kind], **{**more, **own}, select="last" if learnt else "best")
    teacher = Network(name="dense", folder="dense", make=partial(recommender, kind, task, DIM, None), recipe=recipe)
    return Plan(
        teacher=teacher,
        students=tuple(_students(task, config, kind, recipe)),
        about={
            "model": f"{kind}, {DIM} dimensions",
            "budget": "tables of one density have as many entries; `small` has as many bytes, masks and row positions "
            "counted",
            "selection": _SELECTION_LEARNT if learnt else _SELECTION,
            "serving": "dense: product with all items and topk; frozen: the best 20 straight from the packed table",
        },
    )


def recommender(
    kind: str, task: Task, dim: int, density: float | None, dim_of_dense: int | None = None, sparse: bool = False
) -> models.Recommender:
    """A model for the users and items of a task; `sparse`: as of MF and NeuMF, LightGCN has no such option."""
    model: models.Recommender
    if kind == "lightgcn":
        model = models.LightGCN(task.sizes, (task.train.users, task.train.items), dim, density)
    else:
        model = {"mf": models.MF, "neumf": models.NeuMF}[kind](task.sizes, dim, density, sparse)
    model.dim_of_dense = dim if dim_of_dense is None else dim_of_dense
    return model


def _train_pairs(task: Task) -> int:
    """Pairs of the train part, without those of validation: the last training has the batches of the ones before."""
    return int(task.meta.get("pairs", {}).get("train", len(task.train)))


def batch_for(pairs: int) -> int:
    """About 32 batches an epoch, a power of 2 from 512 to 8192: small data sets would hardly take a step otherwise."""
    return int(min(max(2 ** round(math.log2(pairs / 32)), 512), RECIPE.batch_size))


def small_dim(density: float, dim: int = DIM, value_bytes: int = 4) -> int:
    """Dimensions of dense rows that take no more bytes than packed ones: values, a bit for every dimension in words of
    64, a byte of count and an eighth of a base."""
    packed = density * dim * value_bytes + 8 * -(-dim // 64) + 1 + 8 / 64
    return max(1, int(packed / value_bytes))


def _students(task: Task, config: RunConfig, kind: str, recipe: Recipe) -> Iterator[Network]:
    assert config.methods is not None and config.densities is not None  # `tasks.complete` has filled them in
    densities = sorted((density for density in config.densities if density < 1), reverse=True)
    full: dict[str, Any] = {"make": partial(recommender, kind, task, DIM, 1.0), "recipe": recipe}
    for method in config.methods if densities else ():
        if method == "imp":
            rounds = imp_rounds(densities, **(QUICK_IMP if config.quick else IMP), last_epochs=recipe.epochs)
            yield _tickets("IMP", "imp", tuple(densities), rounds, full)
            continue
        for density in densities:
            if method == "small":
                yield _small(task, kind, density, recipe)
            elif method == "one-shot":
                rounds = [(1.0, recipe.epochs), (density, recipe.epochs)]
                yield _tickets("one-shot", f"one-shot-{density:g}", (density,), rounds, full)
            elif method == "pep":
                yield _pep(density, recipe, full)
            else:
                yield _dynamic(method, task, kind, density, recipe, QUICK_EVERY if config.quick else EVERY)


def _tickets(
    name: str, folder: str, densities: tuple[float, ...], rounds: list[tuple[float, int]], full: dict[str, Any]
) -> Network:
    recipe = dataclasses.replace(full["recipe"], epochs=sum(epochs for _, epochs in rounds))
    options = {"rounds": rounds}
    learning: dict[str, Any] = {**full, "recipe": recipe, "method": "table-tickets", "options": options}
    return Network(name=name, folder=folder, densities=densities, **learning)


def _small(task: Task, kind: str, density: float, recipe: Recipe) -> Network:
    dim = small_dim(density)
    make = partial(recommender, kind, task, dim, None, DIM)
    return Network(name=f"dense, {dim} dimensions", folder=f"small-{density:g}", make=make, recipe=recipe)


def _pep(density: float, recipe: Recipe, full: dict[str, Any]) -> Network:
    search = max(1, recipe.epochs // 2)
    longer = dataclasses.replace(recipe, epochs=search + recipe.epochs)
    options = {"density": density, "search": search}
    learning: dict[str, Any] = {**full, "recipe": longer, "method": "pep", "options": options}
    return Network(name="PEP", folder=f"pep-{density:g}", densities=(density,), **learning)


def _dynamic(method: str, task: Task, kind: str, density: float, recipe: Recipe, every: int) -> Network:
    """SparseRec or one of its variants."""
    by_rows = method == "sparserec-adam"
    if by_rows and kind != "mf":
        raise ValueError(
            f"sparsekd run: sparserec-adam moves the rows of a batch and nothing else, got {kind}, which trains more; "
            "take --model mf"
        )
    make = partial(recommender, kind, task, DIM, density, sparse=by_rows)
    options = {"density": density, "every": every, "exchanged": EXCHANGED, **SWITCHES[method]}
    return Network(
        name={"sparserec": "SparseRec", "rigl": "RigL", "random-mask": "random mask"}.get(
            method, method.replace("sparserec-", "SparseRec, ")
        ),
        folder=f"{method}-{density:g}",
        make=make,
        recipe=dataclasses.replace(recipe, **BY_ROWS) if by_rows else recipe,
        alpha=1.0 if method == "sparserec-kd" else 0.0,
        method="sparserec",
        densities=(density,),
        options=options,
    )
