"""MovieLens "latest small": 100 836 timed ratings 0.5-5 of 610 users, with tags. Read from the user's own copy.

F. M. Harper, J. A. Konstan: The MovieLens Datasets: History and Context. ACM TiiS 5(4), 2015.
https://grouplens.org/datasets/movielens/latest/; non-commercial terms, so it does not ship with sparsekd.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from . import ratings, sources
from .movietweetings import split_year
from .parts import Rows
from .task import Task

ARCHIVE = "ml-latest-small.zip"
FILES = ("ratings.csv", "movies.csv", "tags.csv")


def load(root: Path | None) -> Task[Rows]:
    """Read the zip, or ratings.csv, movies.csv and (where it is there) tags.csv of the unpacked folder, in `root`."""
    log, items, meta = read(root)
    return ratings.build("movielens", log, items, target_range=(0.5, 5.0), meta=meta)


def read(root: Path | None) -> tuple[ratings.Log, ratings.Items, dict[str, Any]]:
    """The ratings, the films with their tags, and where they are from."""
    source = sources.find("movielens", root, "ml-latest-small", (ARCHIVE, FILES[0]))
    if source.suffix == ".zip":
        archive = source.read_bytes()
        files = sources.unzip(source.name, archive, FILES)
        digests = {source.name: sources.sha256(archive)}
    else:
        files = {name: (source.parent / name).read_bytes() for name in FILES if (source.parent / name).is_file()}
        digests = {name: sources.sha256(data) for name, data in files.items()}
    missing = [name for name in FILES[:2] if name not in files]
    if missing:
        raise FileNotFoundError(
            f"sparsekd.data.load('movielens'): {source} comes without {', '.join(missing)}; fetch {ARCHIVE} again"
        )
    meta = {"source": source.name, "sha256": digests}
    return _log(files["ratings.csv"]), _items(files["movies.csv"], files.get("tags.csv")), meta


def _log(data: bytes) -> ratings.Log:
    columns = ("userId", "movieId", "rating", "timestamp")
    table = sources.table("ratings.csv", sources.unpack("ratings.csv", data), columns)
    return ratings.Log.parse("ratings.csv", *(table[column] for column in columns))


def _items(movies: bytes, tags: bytes | None) -> ratings.Items:
    table = sources.table("movies.csv", sources.unpack("movies.csv", movies), ("movieId", "title", "genres"))
    titles, years = zip(*map(split_year, table["title"]), strict=True)
    items = ratings.Items(
        ids=_integers("movies.csv", "movieId", table["movieId"]),
        titles=titles,
        years=np.array(years),
        genres=tuple(() if genres.startswith("(") else tuple(genres.split("|")) for genres in table["genres"]),
    )
    if tags is None:
        return items
    table = sources.table("tags.csv", sources.unpack("tags.csv", tags), ("movieId", "tag", "timestamp"))
    return replace(
        items,
        tag_items=_integers("tags.csv", "movieId", table["movieId"]),
        tag_times=_integers("tags.csv", "timestamp", table["timestamp"]),
        tag_texts=table["tag"],
    )


def _integers(name: str, column: str, values: list[str]) -> np.ndarray:
    whole = column != "timestamp"
    return np.array([sources.integer(name, column, row, text, whole) for row, text in enumerate(values, 1)], np.int64)
