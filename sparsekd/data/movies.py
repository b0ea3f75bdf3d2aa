"""The Movies task of arXiv 2401.10484: IMDB score from one of four feature groups, train up to 2013, test after.

Two Kaggle tables, "IMDB 5000" and "TMDB 5000", are joined on title and year; 4 554 films. Their terms are unclear, so
they do not ship with sparsekd. The groups are those of the paper; it leaves open how they become numbers (here: logs of
money and likes, multi-hot categories, TF-IDF reduced by a truncated SVD, all fitted on train films).
This product uses the TMDB API but is not endorsed or certified by TMDB.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..goals import Regression
from . import sources
from .parts import Rows
from .task import Task

IMDB, TMDB = ("movie_metadata.csv",), ("tmdb_5000_movies.csv.gz", "tmdb_5000_movies.csv")
LAST_TRAIN_YEAR = 2013  # The paper's choice: later films are the test set.
# The paper has no val part: every second film of these years is ours, to choose on.
VAL_YEARS = (2012, 2013)
TEXT_DIMS = 96
LARGEST = 3.0  # Features are cut at that many deviations from their mean.
MIN_COUNT = 10  # A category must occur in that many train films to get a column.

# The weight of a train film falls by a factor of e in that many years. These were found on the val part.
RECENT_YEARS = {"numerical": 5.0, "social": 3.0, "textual": 5.0, "categorical": 3.0}

_LIKES = (
    "actor_1_facebook_likes",
    "actor_2_facebook_likes",
    "actor_3_facebook_likes",
    "director_facebook_likes",
    "cast_total_facebook_likes",
    "movie_facebook_likes",
)
IMDB_COLUMNS = (
    *("movie_title", "title_year", "imdb_score", "duration", "budget", "genres", "plot_keywords", "content_rating"),
    *_LIKES,
)
TMDB_COLUMNS = (
    *("title", "release_date", "budget", "runtime", "overview", "tagline", "genres", "keywords"),
    *("production_companies", "production_countries", "spoken_languages"),
)


@dataclass(frozen=True)
class Film:
    """One joined film: its year, score, and its rows of both tables as strings."""

    year: int
    score: float
    imdb: dict[str, str]
    tmdb: dict[str, str]


def load(root: Path | None, group: str = "numerical") -> Task[Rows]:
    """Join the tables found in `root` and make the features of one group: numerical, social, textual or categorical."""
    if group not in GROUPS:
        raise ValueError(f"sparsekd.data.load('movies'): group must be one of {', '.join(GROUPS)}, got {group!r}")
    paths = (sources.find("movies", root, "imdb5000", IMDB), sources.find("movies", root, "tmdb5000", TMDB))
    imdb, tmdb = (path.read_bytes() for path in paths)
    films = join(
        sources.table(paths[0].name, sources.unpack(paths[0].name, imdb), IMDB_COLUMNS, delimiters=",;"),
        sources.table(paths[1].name, sources.unpack(paths[1].name, tmdb), TMDB_COLUMNS),
    )
    train, val, test = parts = split(films)
    features = GROUPS[group](films, train).astype(np.float32)
    target = torch.tensor([film.score for film in films], dtype=torch.float32)
    weight = recency([film.year for film in films], RECENT_YEARS[group])

    def part(rows: np.ndarray) -> Rows:
        return Rows((torch.from_numpy(features[rows]),), target[rows], features[rows], weight=weight[rows])

    return Task(
        name=f"movies-{group}",
        train=part(train),
        val=part(val),
        test=part(test),
        goal=Regression(target_range=(1.0, 10.0)),
        sizes={"features": features.shape[1]},
        mean=float(target[train].double().mean()),
        split=f"test after {LAST_TRAIN_YEAR}; val every second film of {VAL_YEARS[0]}-{VAL_YEARS[1]}; train the rest",
        meta={
            "source": [path.name for path in paths],
            "sha256": {path.name: sources.sha256(data) for path, data in zip(paths, (imdb, tmdb), strict=True)},
            "recent_years": RECENT_YEARS[group],
            "counts": {
                "films": len(films),
                **dict(zip(("train_rows", "val_rows", "test_rows"), map(int, map(sum, parts)), strict=True)),
            },
        },
    )


def split(films: Sequence[Film]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bool masks [N] of the train, val and test films."""
    years = np.array([film.year for film in films], dtype=np.int64)
    test = years > LAST_TRAIN_YEAR
    val = (years >= VAL_YEARS[0]) & ~test
    val[np.flatnonzero(val)[1::2]] = False
    parts = (~val & ~test, val, test)
    if not all(part.any() for part in parts):
        raise ValueError(
            f"sparsekd.data.load('movies'): {len(films)} films are in both tables, of them "
            f"{[int(part.sum()) for part in parts]} for train, val and test, and each needs some; "
            "check that the two files are complete"
        )
    return parts


def recency(years: Sequence[int], scale: float) -> np.ndarray:
    """Weights exp((year - LAST_TRAIN_YEAR) / scale), float32 [N]: old films tell less about the films to come."""
    return np.exp((np.minimum(years, LAST_TRAIN_YEAR) - LAST_TRAIN_YEAR) / scale).astype(np.float32)


def join(imdb: dict[str, list[str]], tmdb: dict[str, list[str]]) -> list[Film]:
    """Films of both tables with equal (ascii-folded lower-case alphanumeric title, year); of doubles the first."""
    by_key: dict[tuple[str, int], dict[str, str]] = {}
    for values in zip(*tmdb.values(), strict=True):
        row = dict(zip(tmdb, values, strict=True))
        if row["release_date"].strip():
            by_key.setdefault((_folded(row["title"]), _date(row["release_date"])[0]), row)
    films = []
    for line, values in enumerate(zip(*imdb.values(), strict=True), 1):
        row = dict(zip(imdb, values, strict=True))
        year = sources.number(IMDB[0], "title_year", line, row["title_year"], blank=0.0)
        match = by_key.pop((_folded(row["movie_title"]), int(year)), None)
        if match is not None:
            score = sources.number(IMDB[0], "imdb_score", line, row["imdb_score"])
            films.append(Film(int(year), score, row, match))
    return films


def _folded(title: str) -> str:
    ascii_only = unicodedata.normalize("NFKD", title).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]", "", ascii_only.lower())


def _date(text: str) -> tuple[int, int, int]:
    """(year, month, day) of YYYY-MM-DD."""
    match = re.fullmatch(r"(\d{4})-(\d\d)-(\d\d)", text.strip())
    if match is None:
        raise ValueError(
            f"sparsekd.data: tmdb_5000_movies.csv: release_date must be YYYY-MM-DD, got {text!r}; correct the file"
        )
    return int(match[1]), int(match[2]), int(match[3])


def _names(text: str) -> list[str]:
    """Names in a JSON list of {"name": ...}, as TMDB writes genres, companies, countries and languages."""
    try:
        return [entry["name"] for entry in json.loads(text or "[]")]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"sparsekd.data: tmdb_5000_movies.csv: expected a JSON list of objects with a name, got {text[:60]!r}; "
            "fetch the file again"
        ) from error


def _column(films: Sequence[Film], name: str, table: str = "imdb") -> np.ndarray:
    """A numeric column, float64 [N]; 0 where it is empty (both tables write 0 for unknown money, minutes and likes)."""
    file = IMDB[0] if table == "imdb" else TMDB[1]
    column = np.array([sources.number(file, name, f.imdb["movie_title"], getattr(f, table)[name], 0.0) for f in films])
    if (column < 0).any():
        title = films[int(np.flatnonzero(column < 0)[0])].imdb["movie_title"]
        raise ValueError(f"sparsekd.data: {file} row {title}: {name} must not be negative; correct the file")
    return column


def _either(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return np.where(first > 0, first, second)


def _standardised(columns: np.ndarray, train: np.ndarray) -> np.ndarray:
    """Zero mean, unit deviation on train films; cut at LARGEST, or rare categories would swamp a product of two."""
    mean, deviation = columns[train].mean(0), columns[train].std(0)
    scaled = (columns - mean) / np.where(deviation > 1e-9, deviation, np.inf)  # a constant column becomes 0
    return np.clip(scaled, -LARGEST, LARGEST)


def _pieces(columns: np.ndarray, train: np.ndarray, bins: int = 8) -> np.ndarray:
    """Piecewise-linear encoding: per column, how far a value has filled each bin between train quantiles.

    Gorishniy, Rubachev, Babenko: On Embeddings for Numerical Features in Tabular Deep Learning, NeurIPS 2022, eq. 1.
    """
    filled = []
    for column in columns.T:
        edges = np.unique(np.quantile(column[train], np.linspace(0, 1, bins + 1)))
        filled += [np.clip((column - low) / (high - low), 0, 1) for low, high in pairwise(edges)]
    return np.stack(filled, axis=1)


def numerical(films: Sequence[Film], train: np.ndarray) -> np.ndarray:
    """Budget, duration, number of companies, release day, month, year (and so the weekday), number of languages."""
    budget = np.log1p(_either(_column(films, "budget", "tmdb"), _column(films, "budget")))
    minutes = _either(_column(films, "duration"), _column(films, "runtime", "tmdb"))
    minutes = _either(minutes, np.full(len(films), np.median(minutes[train & (minutes > 0)])))
    dates = [date(*_date(film.tmdb["release_date"])) for film in films]
    year = np.array([film.year for film in films], dtype=np.float64)
    amounts = np.stack(
        [
            budget,
            np.log(minutes),
            np.log1p([len(_names(film.tmdb["production_companies"])) for film in films]),
            np.log1p([len(_names(film.tmdb["spoken_languages"])) for film in films]),
            year,
        ],
        axis=1,
    )
    calendar = [
        np.eye(7)[[day.weekday() for day in dates]],
        np.eye(12)[[day.month - 1 for day in dates]],
        np.array([[np.sin(day.day * np.pi / 15.5), np.cos(day.day * np.pi / 15.5)] for day in dates]),
    ]
    return _standardised(
        np.concatenate([amounts, budget[:, None] > 0, _pieces(amounts, train), *calendar], axis=1), train
    )


def social(films: Sequence[Film], train: np.ndarray) -> np.ndarray:
    """Likes of three actors, director, cast, rest of the cast, film: logs, their differences, and which are known."""
    likes = {name: _column(films, name) for name in _LIKES}
    actors = [likes[f"actor_{n}_facebook_likes"] for n in (1, 2, 3)]
    rest = np.maximum(likes["cast_total_facebook_likes"] - sum(actors), 0)
    logs = np.log1p(np.stack([*likes.values(), rest], axis=1))
    first, second, third, director, cast, film, _ = logs.T
    ratios = np.stack([film - cast, director - cast, first - cast, second - first, third - second], axis=1)
    amounts = np.concatenate([logs, ratios], axis=1)
    return _standardised(np.concatenate([amounts, logs > 0, _pieces(amounts, train)], axis=1), train)


def categorical(films: Sequence[Film], train: np.ndarray) -> np.ndarray:
    """Production countries, genres (of each table) and content rating, multi-hot; how many countries and genres."""
    lists = [
        (
            _names(f.tmdb["production_countries"]),
            f.imdb["genres"].split("|"),
            _names(f.tmdb["genres"]),
            [f.imdb["content_rating"]],
        )
        for f in films
    ]
    sets = [{(kind, name) for kind, names in enumerate(four) for name in names} for four in lists]
    counts = Counter(name for names, used in zip(sets, train, strict=True) if used for name in names)
    kept = sorted(name for name, count in counts.items() if count >= MIN_COUNT)
    present = [[name in names for name in kept] for names in sets]
    sizes = [[len(names) for names in four[:3]] for four in lists]
    return _standardised(np.concatenate([present, sizes], axis=1).astype(np.float64), train)


def textual(films: Sequence[Film], train: np.ndarray) -> np.ndarray:
    """Title, plot keywords (of both tables), overview, tagline: TF-IDF of words and of whole keywords, each reduced by
    a truncated SVD to TEXT_DIMS; and how long, how punctuated each text is."""
    keywords = [[*f.imdb["plot_keywords"].split("|"), *_names(f.tmdb["keywords"])] for f in films]
    texts = [
        (
            f.imdb["movie_title"],
            f.tmdb["tagline"],
            f.tmdb["overview"],
            f.imdb["plot_keywords"].replace("|", " "),
            " ".join(_names(f.tmdb["keywords"])),
        )
        for f in films
    ]
    lengths = np.log1p([[len(text.split()) for text in five] for five in texts])
    marks = np.log1p([[text.count(mark) for text in five[:3] for mark in "!?.,:0123456789"] for five in texts])
    words = _reduced([" ".join(five) for five in texts], train, stop_words="english", sublinear_tf=True)
    phrases = _reduced(keywords, train, analyzer=list, binary=True)
    return _standardised(np.concatenate([lengths, lengths == 0, marks, words, phrases], axis=1), train)


def _reduced(documents: Sequence[str] | Sequence[list[str]], train: np.ndarray, **options: Any) -> np.ndarray:
    """TF-IDF and truncated SVD, both fitted on train documents: float64 [N, TEXT_DIMS]."""
    try:
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError as error:
        raise RuntimeError(
            "sparsekd.data.load('movies', group='textual') needs scikit-learn; pip install 'sparsekd[run]'"
        ) from error
    vectorizer = TfidfVectorizer(min_df=4, **options)
    vectorizer.fit([document for document, used in zip(documents, train, strict=True) if used])
    counts = vectorizer.transform(documents)
    return TruncatedSVD(min(TEXT_DIMS, counts.shape[1] - 1), random_state=0).fit(counts[train]).transform(counts)


GROUPS: dict[str, Callable[[Sequence[Film], np.ndarray], np.ndarray]] = {
    "numerical": numerical,
    "social": social,
    "textual": textual,
    "categorical": categorical,
}
