"""Readers of real data. `load(name)` gives a `Task`: tensors, splits and provenance; nothing is downloaded."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from . import cifar100, movielens, movies, movietweetings, rankings, sources, streams
from .parts import Pairs, Part, Period, Rows, histories, periods
from .task import Task

__all__ = ["NAMES", "Pairs", "Part", "Period", "Rows", "Task", "histories", "load", "periods", "streams"]

_READERS: dict[str, Callable[..., Task[Any]]] = {
    "movietweetings": movietweetings.load,
    "movielens": movielens.load,
    "movies": movies.load,
    "cifar100": cifar100.load,
    "rankings": rankings.load,
}
NAMES = tuple(_READERS)
_EMBEDDED = ("movietweetings", "rankings")


def load(name: str, data_dir: str | os.PathLike[str] | None = None, **options: Any) -> Task[Any]:
    """Read a task: "movietweetings" (ships with sparsekd), "movielens", "movies" (`group=` picks its features),
    "cifar100" (see `cifar100.load` for its options) or "rankings" (see `rankings.load`: who chose what, in any usual
    format; without a folder the MovieTweetings that ship with sparsekd).

    Args:
        name: one of ``NAMES``.
        data_dir: folder with the files, or with the set's own folder (ml-latest-small/, imdb5000/ and tmdb5000/,
            cifar-100-binary/ or cifar-100-python/); default $SPARSEKD_DATA_<NAME>, then $SPARSEKD_DATA, then the
            embedded copy where there is one.
        options: those of the reader.

    Raises:
        ValueError: for an unknown name or option, or bad contents.
        FileNotFoundError: where the files are not there.

    >>> task = load("movietweetings")
    >>> task.train.target.shape
    torch.Size([80000])
    """
    if name not in _READERS:
        raise ValueError(f"sparsekd.data.load: name must be one of {', '.join(NAMES)}, got {name!r}")
    return _READERS[name](sources.root_of(name, data_dir, embedded=name in _EMBEDDED), **options)
