"""Readers of ratings: what they count, where they look, and which files they refuse."""

import gzip
import json
import lzma
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from sparsekd import data
from sparsekd.data import sources
from sparsekd.data.movietweetings import split_year

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


# ---- bad input: (files, what the message must name)


def test_unknown_names(tmp_path):
    with pytest.raises(ValueError, match="movietweetings, movielens, movies, cifar100, rankings, got 'netflix'"):
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
