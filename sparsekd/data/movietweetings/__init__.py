"""MovieTweetings 100K: 100 000 timed ratings 0-10 from tweets, 2013-02-28 to 2013-09-01. Ships with sparsekd.

Simon Dooms, Toon De Pessemier, Luc Martens: MovieTweetings: a Movie Rating Dataset Collected From Twitter. CrowdRec
2013. https://github.com/sidooms/MovieTweetings, snapshots/100K; MIT licence, see the LICENSE file beside this one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from .. import ratings, sources
from ..parts import Rows
from ..task import Task


def load(root: Path | None) -> Task[Rows]:
    """Read ratings.dat and movies.dat (plain or .xz): the embedded copy, or those in `root`."""
    log, items, meta = read(root)
    return ratings.build("movietweetings", log, items, target_range=(0.0, 10.0), meta=meta)


def read(root: Path | None) -> tuple[ratings.Log, ratings.Items, dict[str, Any]]:
    """The ratings, the films, and where they are from."""
    files: dict[str, bytes] = {}
    source = "embedded" if root is None else root.name
    for stem in ("ratings.dat", "movies.dat"):
        if root is None:
            files[stem + ".xz"] = resources.files(__name__).joinpath(stem + ".xz").read_bytes()
        else:
            path = sources.find("movietweetings", root, "movietweetings", (stem + ".xz", stem))
            files[path.name] = path.read_bytes()
    rating_rows, movie_rows = (_fields(name, data, n) for (name, data), n in zip(files.items(), (4, 3), strict=True))
    meta = {"source": source, "sha256": {name: sources.sha256(data) for name, data in files.items()}}
    return _log(next(iter(files)), rating_rows), _items(movie_rows), meta


def _fields(name: str, data: bytes, count: int) -> list[list[str]]:
    """The `::`-separated fields of every line."""
    lines = sources.text(name, sources.unpack(name, data)).splitlines()
    rows = [line.split("::", count - 1) for line in lines]
    for number, row in enumerate(rows, 1):
        if len(row) != count:
            raise ValueError(
                f"sparsekd.data: {name} line {number}: expected {count} fields separated by '::', got {len(row)}; "
                "fetch the file again"
            )
    return rows


def _log(name: str, rows: Sequence[Sequence[str]]) -> ratings.Log:
    return ratings.Log.parse(name, *zip(*rows, strict=True))


def _items(rows: Sequence[Sequence[str]]) -> ratings.Items:
    titles, years = zip(*(split_year(title) for _, title, _ in rows), strict=True)
    return ratings.Items(
        ids=np.array([sources.integer("movies.dat", "id", line, row[0]) for line, row in enumerate(rows, 1)]),
        titles=titles,
        years=np.array(years),
        genres=tuple(tuple(filter(None, genres.split("|"))) for _, _, genres in rows),
    )


def split_year(title: str) -> tuple[str, float]:
    """Split "Heat (1995)" into ("Heat", 1995.0); NaN where there is no year."""
    match = re.search(r"\((\d{4})[^)]*\)\s*$", title)
    return (title[: match.start()].strip(), float(match[1])) if match else (title.strip(), float("nan"))
