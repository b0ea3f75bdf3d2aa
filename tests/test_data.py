"""Readers: what they count, what they refuse, and that no feature knows the future."""

import csv
import gzip
import io
import json
import lzma
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekd import data
from sparsekd.data import movies, ratings, sources
from sparsekd.data.movietweetings import split_year
from sparsekd.data.task import Recipe

RECIPE = Recipe(lr=1e-3, weight_decay=0.0, epochs=1, batch_size=8)


@pytest.fixture(autouse=True)
def _no_data_variables(monkeypatch):
    for name in [name for name in os.environ if name.startswith("SPARSEKD_DATA")]:
        monkeypatch.delenv(name)


# ---- the rule: strictly earlier ratings only


def small_log(seed=0, count=300, users=12, items=15, times=60):
    """Times with many ties, as users rate several films in one second."""
    rng = np.random.default_rng(seed)
    columns = (rng.integers(1, n + 1, count) for n in (users, items, 10, times))
    user, item, value, time = columns
    return ratings.Log(user, item, value.astype(np.float64), time * 1000)


def small_items(count=15, tags=40):
    rng = np.random.default_rng(1)
    names = ("Comedy", "Drama", "War")
    return ratings.Items(
        ids=np.arange(1, count + 1),
        titles=[f"Film {i}" for i in range(count)],
        years=np.where(np.arange(count) == 3, np.nan, 1970.0 + np.arange(count)),
        genres=[[name for name in names if rng.random() < 0.5] for _ in range(count)],
        tag_items=rng.integers(1, count + 1, tags),
        tag_times=rng.integers(1, 60, tags) * 1000,
        tag_texts=[f"tag{i % 7}" for i in range(tags)],
    )


def small_task(log, items=None):
    return ratings.build("movielens", log, items or small_items(), (0.0, 10.0), (RECIPE, RECIPE), {})


def all_features(task):
    """The table of all rows in the order of time (stable, as the builder sorts)."""
    return np.concatenate([part.features for part in (task.train, task.val, task.test)])


@settings(deadline=None, max_examples=50)
@given(
    events=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(-9, 9)), max_size=20),
    queries=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 7)), max_size=8),
)
def test_earlier_is_the_plain_double_loop(events, queries):
    keys, times, values = (np.array([event[i] for event in events], dtype=np.int64) for i in range(3))
    at_keys, at_times = (np.array([query[i] for query in queries], dtype=np.int64) for i in range(2))
    before = [[i for i in range(len(events)) if keys[i] == k and times[i] < t] for k, t in queries]
    earlier = ratings.Earlier(keys, times, at_keys, at_times)
    assert earlier.count.tolist() == [len(rows) for rows in before]
    assert earlier.sum(values / 4).tolist() == [sum(values[i] / 4 for i in rows) for rows in before]
    latest = [max(rows, key=lambda i: (times[i], i)) if rows else None for rows in before]
    assert earlier.last(values, default=-99).tolist() == [-99 if i is None else values[i] for i in latest]


@pytest.mark.parametrize("row", [0, 40, 150, 250, 299])
def test_changing_a_rating_changes_no_feature_that_is_not_later(row):
    log = small_log()
    log = log.take(np.argsort(log.times, kind="stable"))
    before = all_features(small_task(log))
    values = log.values.copy()
    values[row] = 10.0 - values[row] + (values[row] == 5.0)
    after = all_features(small_task(ratings.Log(log.users, log.items, values, log.times)))
    not_later = log.times <= log.times[row]
    np.testing.assert_array_equal(before[not_later], after[not_later])
    later_of_the_user = ~not_later & (log.users == log.users[row])
    if later_of_the_user.any():  # the features do see the past
        assert (before[later_of_the_user] != after[later_of_the_user]).any(1).all()


def test_dropping_the_test_ratings_changes_no_train_or_val_row():
    log = small_log()
    log = log.take(np.argsort(log.times, kind="stable"))
    whole = small_task(log)
    first_test = len(whole.train) + len(whole.val)
    values = log.values.copy()
    values[first_test:] = 0.0
    other = small_task(ratings.Log(log.users, log.items, values, log.times))
    for name in ("train", "val"):
        for x, y in zip(getattr(whole, name).inputs, getattr(other, name).inputs, strict=True):
            assert torch.equal(x, y)


def test_a_tag_is_seen_only_by_later_ratings():
    log = small_log()
    log = log.take(np.argsort(log.times, kind="stable"))
    items = small_items()
    before = all_features(small_task(log, items))
    texts = [*items.tag_texts[:-1], "something else entirely"]
    changed = ratings.Items(
        items.ids, items.titles, items.years, items.genres, items.tag_items, items.tag_times, tag_texts=texts
    )
    after = all_features(small_task(log, changed))
    sees = (log.items == items.tag_items[-1]) & (log.times > items.tag_times[-1])
    np.testing.assert_array_equal(before[~sees], after[~sees])
    assert sees.any() and (before[sees] != after[sees]).any(1).all()


def test_vocabularies_come_from_train_rows():
    log = small_log()
    order = np.argsort(log.times, kind="stable")
    users, items = log.users.copy(), log.items.copy()
    users[order[-5:]], items[order[-5:]] = 99, 15
    content = small_items()
    content.genres[14].append("OnlyInTest")
    keep = (items != 15) | np.isin(np.arange(len(items)), order[-5:])
    task = small_task(ratings.Log(users, items, log.values, log.times).take(keep), content)
    assert task.test.users[-5:].tolist() == [0] * 5 and task.test.items[-5:].tolist() == [0] * 5
    assert task.sizes["users"] == 12 + 1 and task.sizes["items"] == 14 + 1
    assert task.meta["counts"]["test_rows_of_new_users"] >= 5
    known = small_task(ratings.Log(users, items, log.values, log.times).take(keep), small_items())
    assert task.sizes["item_features"] == known.sizes["item_features"]  # the genre no train row has gets no column


def test_equal_times_stay_on_one_side_of_the_split():
    task = small_task(small_log(times=12))
    log = small_log(times=12)
    times = np.sort(log.times)
    edges = np.cumsum([len(task.train), len(task.val)])
    assert all(times[edge - 1] < times[edge] for edge in edges)
    assert task.meta["val_begins"] == times[edges[0]] and task.meta["test_begins"] == times[edges[1]]


def test_running_biases_of_a_hand_made_log():
    """Two ratings of one item, 8 then 4: the second sees (5 + 8) / 2 as mean and 3 / (1 + shrink) as item effect."""
    log = ratings.Log(*(np.array(x) for x in ([1, 2, 3], [1, 1, 1])), np.array([8.0, 4.0, 6.0]), np.array([10, 20, 30]))
    _, _, prior = ratings._history(log, np.zeros((3, 1), np.float32), (0.0, 10.0))
    second = 6.5 + 3.0 / (1 + ratings.SHRINK_ITEM)
    third = 17 / 3 + (3.0 + (4.0 - 6.5)) / (2 + ratings.SHRINK_ITEM)
    np.testing.assert_allclose(prior, [5.0, second, third], rtol=1e-6)


# ---- the embedded set


@pytest.fixture(scope="module")
def tweetings():
    return data.load("movietweetings")


def test_movietweetings_is_whole(tweetings):
    counts = tweetings.meta["counts"]
    assert (counts["ratings"], counts["users"], counts["items"]) == (100_000, 16_554, 10_506)
    assert [len(part) for part in (tweetings.train, tweetings.val, tweetings.test)] == [80_000, 10_000, 10_000]
    assert tweetings.meta["sha256"] == {
        "ratings.dat.xz": "ca19383d3fcbe94afc3fd0a61866f89e028d1a4f846ec28dabbb2c30974eddc6",
        "movies.dat.xz": "ca09b2cb7fed2adfe853c568c5d55fa9837a55fe86a27d895563a9a036c6d50d",
    }
    json.dumps(tweetings.meta)


def test_movietweetings_rows_are_finite_and_in_range(tweetings):
    for part in (tweetings.train, tweetings.val, tweetings.test):
        assert all(torch.isfinite(x.float()).all() for x in part.inputs) and np.isfinite(part.features).all()
        assert part.target.min() >= 0 and part.target.max() <= 10
        assert part.users.max() < tweetings.sizes["users"] and part.items.max() < tweetings.sizes["items"]
    assert tweetings.mean == pytest.approx(tweetings.train.target.double().mean().item())


def test_the_licence_notice_ships_beside_the_files():
    notice = (Path(data.movietweetings.__file__).parent / "LICENSE").read_text()
    assert "MIT License" in notice and "Simon Dooms" in notice


def test_movietweetings_by_path_equals_the_embedded_copy(tmp_path, monkeypatch):
    ratings_text = "\n".join(f"{i % 5 + 1}::{i % 7 + 1}::{i % 10}::{1000 + i}" for i in range(50))
    (tmp_path / "ratings.dat").write_text(ratings_text)
    (tmp_path / "movies.dat.xz").write_bytes(
        lzma.compress("\n".join(f"{i}::F {i} (2001)::War" for i in range(1, 8)).encode())
    )
    monkeypatch.setenv("SPARSEKD_DATA_MOVIETWEETINGS", str(tmp_path))
    task = data.load("movietweetings")
    assert task.meta["counts"]["ratings"] == 50 and task.meta["source"] == tmp_path.name
    monkeypatch.delenv("SPARSEKD_DATA_MOVIETWEETINGS")
    monkeypatch.setenv("SPARSEKD_DATA", str(tmp_path))  # a general folder does not hide the embedded copy
    assert data.load("movietweetings").meta["source"] == "embedded"


@pytest.mark.parametrize(
    ("title", "expected"), [("Heat (1995)", ("Heat", 1995.0)), ("Show (2006-2011)", ("Show", 2006.0))]
)
def test_split_year(title, expected):
    assert split_year(title) == expected
    assert np.isnan(split_year("No year")[1])


# ---- MovieLens


def movielens_files(count=60):
    return {
        "ratings.csv": "userId,movieId,rating,timestamp\n"
        + "\n".join(f"{i % 5 + 1},{i % 7 + 1},{(i % 10 + 1) / 2},{1000 + i}" for i in range(count)),
        "movies.csv": 'movieId,title,genres\n1,"Fox, The (1999)",Drama|War\n2,Plain,(no genres listed)\n',
        "tags.csv": "userId,movieId,tag,timestamp\n1,1,dark comedy,1010\n",
    }


def write_zip(path, files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(f"ml-latest-small/{name}", content)


def write_folder(path, files):
    path.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (path / name).write_text(content)


def test_movielens_zip_and_folder_give_the_same_task(tmp_path):
    write_folder(tmp_path / "a" / "ml-latest-small", movielens_files())
    (tmp_path / "b").mkdir()
    write_zip(tmp_path / "b" / "ml-latest-small.zip", movielens_files())
    folder = data.load("movielens", tmp_path / "a")
    for place in (tmp_path / "b", tmp_path / "b" / "ml-latest-small.zip"):
        archive = data.load("movielens", place)
        assert all(torch.equal(x, y) for x, y in zip(folder.test.inputs, archive.test.inputs, strict=True))
    assert set(folder.meta["sha256"]) == {"ratings.csv", "movies.csv", "tags.csv"}
    assert set(archive.meta["sha256"]) == {"ml-latest-small.zip"}


# ---- Movies


def film_tables(
    films=(("Amélie! ", "Amelie", 2001), ("B", "B", 2012), ("C", "C", 2013), ("D", "D", 2015), ("X", "Y", 2000)),
):
    """Rows of both tables for (IMDB title, TMDB title, year), with values that differ from row to row."""
    imdb, tmdb = [], []
    for i, (imdb_title, tmdb_title, year) in enumerate(films):
        row = dict.fromkeys(movies._IMDB_COLUMNS, str(100 * i))
        row |= {"movie_title": imdb_title, "title_year": f"{year}", "imdb_score": f"{5 + i / 2}", "genres": "Drama|War"}
        imdb.append(row | {"plot_keywords": "a|b c", "content_rating": "R"})
        names = json.dumps([{"name": "Drama"}, {"name": "France"}][: 1 + i % 2])
        row = dict.fromkeys(movies._TMDB_COLUMNS, names)
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


# ---- bad input: (files, what the message must name)


def test_unknown_names(tmp_path):
    with pytest.raises(ValueError, match="movietweetings, movielens, movies, cifar100, got 'netflix'"):
        data.load("netflix")
    with pytest.raises(ValueError, match=r"group must be one of .*, got 'sound'"):
        data.load("movies", tmp_path, group="sound")


@pytest.mark.parametrize("name", ["movielens", "movies"])
def test_no_folder(name, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"SPARSEKD_DATA_{name.upper()}"):
        data.load(name)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        data.load(name, tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"found none of .*(ml-latest-small|imdb5000)"):
        data.load(name, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ratings.csv": "userId,movieId,score\n1,2,3\n"}, "ratings.csv lacks the column.s. rating, timestamp"),
        ({"ratings.csv": ""}, "ratings.csv is empty"),
        ({"ratings.csv": "userId,movieId,rating,timestamp\n"}, "no rows"),
        ({"ratings.csv": "userId,movieId,rating,timestamp\n1,2,nan,5\n"}, "ratings.csv row 1: rating .* got 'nan'"),
        ({"ratings.csv": "userId,movieId,rating,timestamp\n1,2,3,5\n1,2\n"}, "line 3: expected 4 fields, got 2"),
        ({"ratings.csv": "userId,movieId,rating,timestamp\n1,2,7,5\n"}, "must lie in 0.5..5 .*rating 7"),
        ({"ratings.csv": "userId,movieId,rating,timestamp\n1,2,3,5\n"}, "too few distinct times"),
        ({"movies.csv": "movieId,title,genres\nx,Heat (1995),Drama\n"}, "movies.csv row 1: movieId .* got 'x'"),
        ({"tags.csv": "movieId,tag\n1,a\n"}, "tags.csv lacks the column.s. timestamp"),
    ],
)
def test_bad_movielens_contents(tmp_path, changes, message):
    write_folder(tmp_path, movielens_files() | changes)
    with pytest.raises(ValueError, match=message):
        data.load("movielens", tmp_path)


def test_corrupt_archives(tmp_path):
    write_zip(tmp_path / "ml-latest-small.zip", movielens_files())
    whole = (tmp_path / "ml-latest-small.zip").read_bytes()
    for broken in (b"not a zip", whole[: len(whole) // 2], whole[:80] + b"\xff" * 20 + whole[100:]):
        (tmp_path / "ml-latest-small.zip").write_bytes(broken)
        with pytest.raises(ValueError, match=r"ml-latest-small.zip is corrupt or cut short"):
            data.load("movielens", tmp_path)
    write_zip(tmp_path / "ml-latest-small.zip", {"movies.csv": "x"})
    with pytest.raises(FileNotFoundError, match=r"without ratings.csv"):
        data.load("movielens", tmp_path)


@pytest.mark.parametrize(("suffix", "pack"), [(".xz", lzma.compress), (".gz", gzip.compress)])
def test_corrupt_compressed_files(suffix, pack):
    whole = pack(b"1::2::3::4\n" * 500)
    assert sources.unpack("a" + suffix, whole) == b"1::2::3::4\n" * 500
    for broken in (whole[:-9], b"plain text", whole[:30] + b"\x00\xff" + whole[32:], b""):
        with pytest.raises(ValueError, match=r"is corrupt or cut short|is empty"):
            sources.unpack("a" + suffix, broken)
    with pytest.raises(ValueError, match="is empty"):
        sources.unpack("a" + suffix, pack(b""))


def test_bad_movietweetings_contents(tmp_path):
    (tmp_path / "movies.dat").write_text("1::A (2000)::War")
    for content, message in (
        ("1::2::3", "line 1: expected 4 fields"),
        ("1::2::x::4", "rating must be a finite number"),
    ):
        (tmp_path / "ratings.dat").write_text(content)
        with pytest.raises(ValueError, match=message):
            data.load("movietweetings", tmp_path)
    (tmp_path / "ratings.dat").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ValueError, match="not UTF-8"):
        data.load("movietweetings", tmp_path)


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
