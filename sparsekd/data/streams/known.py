"""The streams that sparsekd knows by name."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .. import movielens, movietweetings, ratings, sources
from .columns import Columns, Events
from .drift import DriftingClicks
from .windows import ClickStream, EventStream, TableStream

STREAMS = (
    "movietweetings",
    "movielens",
    "online-retail",
    "synthetic-gradual",
    "synthetic-abrupt",
    "synthetic-recurring",
)
_ROWS = {"movietweetings": 2_500, "movielens": 2_500, "online-retail": 10_000}


def known(
    name: str, data_dir: str | os.PathLike[str] | None = None, *, rows: int | None = None, seed: int = 0, **options: Any
) -> ClickStream:
    """A stream of `STREAMS`.

    movietweetings (embedded)  a rating of 8 or more is a click; movielens: of 4 or more. The features are those of the
        rating tasks, of strictly earlier ratings alone, and the genres.
    online-retail              every line of an invoice is a click; one line without is drawn for each.
    synthetic-...              `DriftingClicks`, which takes the options.

    data_dir  as for `data.load`. rows: of a window; default 2 500 ratings, 10 000 invoice lines, 20 000 synthetic rows.

    Raises ValueError for another name, FileNotFoundError for missing files.
    """
    if name not in STREAMS:
        raise ValueError(f"sparsekd.data.streams.known: name must be one of {', '.join(STREAMS)}, got {name!r}")
    if name.startswith("synthetic-"):
        if rows is not None:
            options["rows"] = rows
        return DriftingClicks(name.removeprefix("synthetic-"), seed=seed, **options)
    if options:
        raise ValueError(f"sparsekd.data.streams.known: {name} takes no {', '.join(options)}; synthetic streams do")
    rows = rows or _ROWS[name]
    root = sources.root_of(name.replace("-", "_"), data_dir, embedded=name == "movietweetings")
    if name == "online-retail":
        return _online_retail(root, rows, seed)
    return _RATINGS[name](root, rows)


def _of_ratings(
    name: str,
    read: Callable[[Path | None], tuple[ratings.Log, ratings.Items, dict[str, Any]]],
    target_range: tuple[float, float],
    click_at: float,
    root: Path | None,
    rows: int,
) -> TableStream:
    log, items, meta = read(root)
    log = log.take(np.argsort(log.times, kind="stable"))
    genres = ratings.genres_of(log, items)
    of_user, of_item, prior = ratings.history(log, genres, target_range)
    numeric = np.concatenate([prior[:, None], of_user, of_item, genres], axis=1)
    ids = np.stack([log.users, log.items], axis=1)
    clicks = (log.values >= click_at).astype(np.float32)
    return TableStream(
        name, Events(log.times.astype(np.float64), clicks, numeric, ids), rows=rows, sha256=meta["sha256"]
    )


def _online_retail(root: Path | None, rows: int, seed: int) -> EventStream:
    file = "online_retail_2009_2010.csv"
    path = sources.find("online_retail", root, "online-retail-2009", (file + ".xz", file))
    columns = Columns(
        user="Customer ID",
        item="StockCode",
        timestamp="InvoiceDate",
        label=None,
        numeric=("Price",),
        categorical=("Country",),
        of_item=("Price",),
    )
    return EventStream([path], columns, rows=rows, seed=seed)


_RATINGS: dict[str, Callable[[Path | None, int], TableStream]] = {
    "movietweetings": partial(_of_ratings, "movietweetings", movietweetings.read, (0.0, 10.0), 8.0),
    "movielens": partial(_of_ratings, "movielens", movielens.read, (0.5, 5.0), 4.0),
}
