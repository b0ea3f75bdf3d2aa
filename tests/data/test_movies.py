"""The Movies task: how its tables are joined, that no feature knows later films, and what is refused."""

import csv
import gzip
import io
import json
import os

import numpy as np
import pytest
import torch

from sparsekd import data
from sparsekd.data import movies


def film_tables(
    films=(("Amélie! ", "Amelie", 2001), ("B", "B", 2012), ("C", "C", 2013), ("D", "D", 2015), ("X", "Y", 2000)),
):
    """Rows of both tables for (IMDB title, TMDB title, year), with values that differ from row to row."""
    imdb, tmdb = [], []
    for i, (imdb_title, tmdb_title, year) in enumerate(films):
        row = dict.fromkeys(movies.IMDB_COLUMNS, str(100 * i))
        row |= {"movie_title": imdb_title, "title_year": f"{year}", "imdb_score": f"{5 + i / 2}", "genres": "Drama|War"}
        imdb.append(row | {"plot_keywords": "a|b c", "content_rating": "R"})
        names = json.dumps([{"name": "Drama"}, {"name": "France"}][: 1 + i % 2])
        row = dict.fromkeys(movies.TMDB_COLUMNS, names)
        row |= {
            "title": tmdb_title,
            "release_date": f"{year}-05-0{i + 1}",
            "budget": "5",
            "runtime": "",
            "overview": "so",
        }
        tmdb.append(row | {"tagline": "Run!"})
    return imdb, tmdb


def as_csv(rows, delimiter=","):
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def write_films(root, imdb, tmdb):
    for folder in ("imdb5000", "tmdb5000"):
        (root / folder).mkdir(parents=True)
    (root / "imdb5000" / "movie_metadata.csv").write_text(as_csv(imdb, ";"), encoding="utf-8")
    (root / "tmdb5000" / "tmdb_5000_movies.csv.gz").write_bytes(gzip.compress(as_csv(tmdb).encode()))


@pytest.mark.parametrize("group", ["numerical", "social", "categorical"])
def test_movies_join_and_split(tmp_path, group):
    write_films(tmp_path, *film_tables())
    task = data.load("movies", tmp_path, group=group)
    assert task.name == f"movies-{group}"
    assert [part.target.tolist() for part in (task.train, task.val, task.test)] == [[5.0, 6.0], [5.5], [6.5]]
    assert all(np.isfinite(part.features).all() for part in (task.train, task.val, task.test))
    assert task.train.weight[1] > task.train.weight[0]  # 2013 weighs more than 2001


def test_join_takes_the_first_of_doubles():
    films = film_tables((("A", "A", 2001), ("a!", "A", 2001)))
    imdb, tmdb = ({name: [row[name] for row in rows] for name in rows[0]} for rows in films)
    (film,) = movies.join(imdb, tmdb)
    assert film.score == 5.0 and film.tmdb["release_date"] == "2001-05-01"


@pytest.mark.parametrize("group", list(movies.GROUPS))
def test_movie_features_take_nothing_from_later_films(group):
    """Features of train films stay bit-equal when every test film is another one."""
    train = np.arange(60) < 50

    def features(last):
        imdb, tmdb = film_tables([(f"T{i} war", f"T{i} war", 1980 + i % 30) for i in range(50)])
        for i, row in enumerate(imdb):
            row["genres"] = "Drama|War" if i % 2 else "Drama"
        for i, row in enumerate(tmdb):
            row["release_date"] = f"{1980 + i % 30}-0{i % 9 + 1}-11"
            row["overview"] = f"word{i % 5} word{i % 3}"
        rows = [(a, b) for a, b in zip(imdb, tmdb, strict=True)]
        films = [movies.Film(1980 + i % 30, 5.0, a, b) for i, (a, b) in enumerate(rows)]
        return movies.GROUPS[group](films + [last] * 10, train)

    imdb, tmdb = film_tables()
    odd = [
        movies.Film(
            2015, 9.0, a | {"duration": d, "actor_1_facebook_likes": d, "genres": g}, b | {"overview": o, "tagline": o}
        )
        for a, b, d, o, g in (
            (imdb[1], tmdb[1], "1", "word1", "War"),
            (imdb[3], tmdb[3], "999999", "fresh words only", "Noir"),
        )
    ]
    first, second = features(odd[0]), features(odd[1])
    np.testing.assert_array_equal(first[train], second[train])
    assert (first[~train] != second[~train]).any()


@pytest.mark.skipif(
    "SPARSEKD_TEST_DATA" not in os.environ, reason="set SPARSEKD_TEST_DATA to a folder with the film tables"
)
def test_movies_of_the_paper():
    task = data.load("movies", os.environ["SPARSEKD_TEST_DATA"], group="categorical")
    assert task.meta["counts"]["films"] == 4554
    assert len(task.train) + len(task.val) == 4051 and len(task.test) == 503
    both = torch.cat([task.train.target, task.val.target]).double()
    error = task.test.target.double() - both.mean()
    assert (error.abs().mean().item(), error.square().mean().item()) == pytest.approx((0.956, 1.511), abs=1e-3)


def test_textual_without_scikit_learn_says_what_to_install(tmp_path, monkeypatch):
    write_films(tmp_path, *film_tables())
    monkeypatch.setitem(__import__("sys").modules, "sklearn.decomposition", None)
    with pytest.raises(RuntimeError, match=r"sparsekd\[run\]"):
        data.load("movies", tmp_path, group="textual")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"imdb_score": ""}, "imdb_score must be a finite number"),
        ({"duration": "inf"}, "duration must be a finite number"),
        ({"release_date": "2001/05/01"}, "release_date must be YYYY-MM-DD"),
        ({"production_companies": "[{]"}, "expected a JSON list"),
    ],
)
def test_bad_movie_contents(tmp_path, change, message):
    imdb, tmdb = film_tables()
    for rows in (imdb, tmdb):
        rows[0].update({name: value for name, value in change.items() if name in rows[0]})
    write_films(tmp_path, imdb, tmdb)
    with pytest.raises(ValueError, match=message):
        data.load("movies", tmp_path)


def test_movies_missing_columns_are_named(tmp_path):
    imdb, tmdb = film_tables()
    for row in imdb:
        del row["imdb_score"], row["budget"]
    write_films(tmp_path, imdb, tmdb)
    with pytest.raises(ValueError, match=r"movie_metadata.csv lacks the column\(s\) imdb_score, budget"):
        data.load("movies", tmp_path)


def test_films_without_a_match_are_an_error_not_an_empty_task(tmp_path):
    write_films(tmp_path, *film_tables((("A", "B", 2001), ("C", "D", 2012))))
    with pytest.raises(ValueError, match="0 films are in both tables"):
        data.load("movies", tmp_path)
