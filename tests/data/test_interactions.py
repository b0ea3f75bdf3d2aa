"""Files of interactions in every format, small and written here, and what is wrong with others."""

import gzip
import lzma
import time
import zipfile

import numpy as np
import pytest

from sparsekd import data
from sparsekd.data import interactions


def write(folder, **files):
    """Files by name; an underscore stands for the dot."""
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text)
    return folder


def pairs(log):
    return list(zip(log.users.tolist(), log.items.tolist(), strict=True))


def test_lightgcn_text_keeps_its_numbers(tmp_path):
    write(tmp_path, train_txt="0 3 1\n2 0\n1\n", test_txt="0 2\n")
    (tmp_path / "valid.txt.xz").write_bytes(lzma.compress(b"2 1\n"))
    source = interactions.read(tmp_path)
    assert {name: pairs(log) for name, log in source.parts.items()} == {
        "train": [(0, 3), (0, 1), (2, 0)], "val": [(2, 1)], "test": [(0, 2)],
    }  # fmt: skip
    assert source.numbered and source.likes is None and set(source.sha256) == {"train.txt", "valid.txt.xz", "test.txt"}


def test_lightgcn_triples_may_count_in_powers_of_ten(tmp_path):
    write(tmp_path, data1_txt="7 9 1\n7 8 3.2e+05\n", test1_txt="7 10 2\n")
    source = interactions.read(tmp_path)
    assert pairs(source.parts["train"]) == [(7, 9), (7, 8)] and pairs(source.parts["test"]) == [(7, 10)]


@pytest.mark.parametrize("split", [False, True])
def test_recbole_atomic_files(tmp_path, split):
    text = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n007\ti1\t5\t20\n7\ti2\t3\t10\n"
    names = ("shop.train.inter", "shop.valid.inter", "shop.test.inter") if split else ("shop.inter",)
    for name in names:
        (tmp_path / name).write_text(text)
    source = interactions.read(tmp_path)
    assert set(source.parts) == ({"train", "val", "test"} if split else {"all"})
    log = next(iter(source.parts.values()))
    assert pairs(log) == [("007", "i1"), ("7", "i2")] and log.times.tolist() == [20, 10] and source.likes == 4


@pytest.mark.parametrize("name", ["ratings.dat", "u.data", "ratings.csv", "ml-small.zip"])
def test_movielens(tmp_path, name):
    rows = [["1", "31", "2.5", "100"], ["2", "10", "4.0", "50"]]
    delimiter = {"ratings.dat": "::", "u.data": "\t"}.get(name, ",")
    heading = ["userId,movieId,rating,timestamp"] if delimiter == "," else []
    text = "\n".join([*heading, *(delimiter.join(row) for row in rows)]) + "\n"
    if name.endswith(".zip"):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr("ml-small/ratings.csv", text)
    else:
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
    (log,) = interactions.read(tmp_path).parts.values()
    assert pairs(log) == [(1, 31), (2, 10)]
    assert log.ratings.tolist() == [2.5, 4.0] and log.times.tolist() == [100, 50]


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet"])
def test_tables_with_named_columns(tmp_path, kind):
    columns = {"who": ["ann", "bob"], "what": [3, 4], "stars": [9, 6]}
    path = tmp_path / f"shop.{kind}"
    if kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.table(columns), path)
    else:
        delimiter = {"csv": ";", "tsv": "\t"}[kind]
        lines = [delimiter.join(map(str, line)) for line in zip(*columns.values(), strict=True)]
        path.write_text("\n".join([delimiter.join(columns), *lines]) + "\n")
    source = interactions.read(path, {"user": "who", "item": "what"})
    log = source.parts["all"]
    assert pairs(log) == [("ann", 3), ("bob", 4)] and log.ratings.tolist() == [9, 6] and log.times is None
    assert source.likes == 7
    with pytest.raises(
        ValueError, match=r"shop.* lacks a column of the user \(user, .*its header has who, what, stars"
    ):
        interactions.read(path)
    with pytest.raises(ValueError, match=r"lacks a column of the time .*in sparsekd run by --time"):
        interactions.read(path, {"user": "who", "item": "what", "time": "when"})


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        ({"ratings.dat": "1::2::3::4\n"}, "ratings.dat"),
        ({"u.data": "1\t2\t3\t4\n"}, "u.data"),
        ({"train.txt": "0 1\n", "test.txt": "0 2\n"}, "LightGCN text"),
    ],
)
def test_columns_of_files_without_a_header_are_refused(tmp_path, files, kind):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert interactions.read(tmp_path).parts
    with pytest.raises(ValueError, match=rf"columns belong to a table with a header, got user for {kind}, .*leave"):
        interactions.read(tmp_path, {"user": "who"})


def test_times_are_numbers_or_dates(tmp_path):
    path = tmp_path / "shop.csv"
    times = ["1970-01-02", "1970-01-01 00:01:00", "1970-01-01T01:00:00+01:00", "1970-01-01T00:00:09Z"]
    path.write_text("\n".join(["user,item,date", *(f"1,{item},{time}" for item, time in enumerate(times))]))
    assert interactions.read(path).parts["all"].times.tolist() == [86400, 60, 0, 9]
    path.write_text("user,item,date\n1,2,1970-01-02\n1,3,soon\n")
    with pytest.raises(ValueError, match=r"row 2: time must be a date as 2020-10-15 14:55:23, or .*, got 'soon'"):
        interactions.read(path)


def test_parquet_with_empty_fields_cut_short_or_without_rows(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"user": ["a", None], "item": [1, 2]}), path)
    with pytest.raises(ValueError, match=r"a.parquet row 2: user is empty"):
        interactions.read(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="is no Parquet file, or cut short"):
        interactions.read(path)
    parquet.write_table(pyarrow.table({"user": pyarrow.array([], "int64"), "item": pyarrow.array([], "int64")}), path)
    with pytest.raises(ValueError, match="has no rows"):
        interactions.read(path)


BAD = [
    ({"train_txt": "0 1 x\n", "test_txt": "0 2\n"}, r"train.txt line 1: expected a user and items.*'0 1 x'"),
    ({"train_txt": "0 1\n", "test_txt": "0 -2\n"}, r"test.txt line 1: expected a user and items"),
    ({"train_txt": "0 1\n", "test_txt": "0 99999999999999999999\n"}, r"test.txt line 1: expected a user and items"),
    ({"train_txt": "0 1\n", "test_txt": ""}, "test.txt is empty"),
    ({"ratings_dat": "1::2::3\n"}, "ratings.dat line 1: expected 4 fields, got 3"),
    ({"ratings_dat": "1::2::many::3\n"}, "ratings.dat row 1: rating must be a finite number, got 'many'"),
    ({"data1_txt": "1 2 3\n1 2\n", "test1_txt": "1 2 3\n"}, "data1.txt line 2: expected 3 fields, got 2"),
    ({"a_csv": "user,item\n1,2\n", "b_csv": "user,item\n1,2\n"}, "several tables, a.csv, b.csv"),
    ({"a_csv": "user,item\n1,2\n,3\n"}, "a.csv row 2: the user is empty"),
    ({"a_csv": "user,item\n1,2\n3\n"}, "a.csv line 3: expected 2 fields, got 1"),
    ({"a_inter": "user_id:token\titem_id:token\n", "b_inter": "x"}, "several atomic files, a.inter, b.inter"),
    ({"a_inter": "user_id:token\trating:float\n1\t2\n"}, "a.inter lacks a column of the item"),
]


@pytest.mark.parametrize(("files", "message"), BAD, ids=range(len(BAD)))
def test_bad_files_are_named(tmp_path, files, message):
    with pytest.raises(ValueError, match=message):
        interactions.read(write(tmp_path, **files))


def test_a_folder_without_interactions_says_what_is_expected(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no interactions in .*expected train.txt and test.txt"):
        interactions.read(write(tmp_path, README_md="nothing"))
    with pytest.raises(ValueError, match="columns may name user, item, rating, time, got whom"):
        interactions.read(tmp_path, {"whom": "x"})


def test_text_and_number_ids_stay_what_they_are(tmp_path):
    log = interactions.read(write(tmp_path, a_csv="user,item\n1,01\n2,2\n")).parts["all"]
    assert log.users.dtype == np.int64 and log.items.tolist() == ["01", "2"]


def write_parquet(path, **columns):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    arrays = {name: value if isinstance(value, list) else pyarrow.array(*value) for name, value in columns.items()}
    parquet.write_table(pyarrow.table(arrays), path)
    return path


def test_parquet_ids_of_bytes_are_text_and_whole_floats_are_whole(tmp_path):
    path = write_parquet(
        tmp_path / "a.parquet", user=[b"u3", "ü".encode()], item=[3.0, 4.0], rating=[4.5, 2.0], date=[1.5, 2.0]
    )
    log = interactions.read(path).parts["all"]
    assert pairs(log) == [("u3", 3), ("ü", 4)] and log.items.dtype == np.int64
    assert log.ratings.tolist() == [4.5, 2] and log.times.tolist() == [1.5, 2]


@pytest.mark.parametrize(
    ("user", "message"),
    [
        ([b"a", b"\xff"], r"a.parquet: user must hold UTF-8 text, numbers or dates, got binary \(.*0xff.*; write it"),
        ([["a"], ["b", "c"]], r"a.parquet: user must hold one value a row, got list<.*; write a row for each"),
        ([{"id": 1}, {"id": 2}], r"a.parquet: user must hold one value a row, got struct<"),
        ([1.0, float("nan")], r"a.parquet row 2: user is empty; fill it"),
    ],
)
def test_parquet_ids_that_are_none_are_refused(tmp_path, user, message):
    path = write_parquet(tmp_path / "a.parquet", user=user, item=[1, 2])
    with pytest.raises(ValueError, match=message):
        interactions.read(path)


@pytest.mark.parametrize("kind", ["s", "ms", "us", "ns"])
@pytest.mark.parametrize("zone", [None, "UTC", "+01:00"])
def test_parquet_times_of_any_unit(tmp_path, monkeypatch, kind, zone):
    pyarrow = pytest.importorskip("pyarrow")
    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()
    second = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[kind]
    times = [1_600_000_000 * second + (kind == "ns"), 60 * second]
    path = write_parquet(tmp_path / "a.parquet", user=[1, 2], item=[1, 2], time=(times, pyarrow.timestamp(kind, zone)))
    try:
        assert interactions.read(path).parts["all"].times.tolist() == [1_600_000_000, 60]
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize(
    ("header", "columns"),
    [
        ("User,Item,TIMESTAMP", {}),
        ("user, item, time", {}),
        ('"User" , "Item" , "Time"', {}),
        ("who , what , when", {"user": "who", "item": "what ", "time": "when"}),
    ],
)
def test_headings_may_have_capitals_and_blanks(tmp_path, header, columns):
    between = ", " if " " in header else ","
    rows = [between.join(row) for row in (("ann", '"3"', "7"), ("bob", "4", "8"))]
    path = tmp_path / "shop.csv"
    path.write_text("\n".join([header, *rows]) + "\n")
    log = interactions.read(path, columns).parts["all"]
    assert pairs(log) == [("ann", 3), ("bob", 4)] and log.times.tolist() == [7, 8]


def test_headings_as_they_are_written_come_first(tmp_path):
    log = interactions.read(write(tmp_path, a_csv="User,user_id,item,x,X\n1,2,3,4,5\n")).parts["all"]
    assert pairs(log) == [(2, 3)]
    with pytest.raises(ValueError, match=r"lacks a column of the user \(USER\); its header has User, user_id"):
        interactions.read(tmp_path, {"user": "USER"})
    assert pairs(interactions.read(tmp_path, {"user": "X"}).parts["all"]) == [(5, 3)]
    parquet = write_parquet(tmp_path / "b.parquet", **{" User ": [1], "ITEM": [2]})
    assert pairs(interactions.read(parquet).parts["all"]) == [(1, 2)]
    assert pairs(interactions.read(parquet, {"user": "User"}).parts["all"]) == [(1, 2)]


@pytest.mark.parametrize("end", ["\r", "\r\n", "\n"])
def test_lines_end_as_on_any_system(tmp_path, end):
    path = tmp_path / "a.csv"
    path.write_bytes(end.join(["user,item,time", "1,2,30", "1,3,10", ""]).encode())
    log = interactions.read(path).parts["all"]
    assert pairs(log) == [(1, 2), (1, 3)] and log.times.tolist() == [30, 10]


@pytest.mark.parametrize("code", ["latin-1", "utf-16", "utf-16-le"])
@pytest.mark.parametrize("name", ["a.csv", "ratings.dat"])
def test_text_in_another_code_is_to_be_saved_as_utf8(tmp_path, code, name):
    text = "1::2::3::4\nJosé::2::3::4\n" if name == "ratings.dat" else "user,item\nJosé,2\n"
    (tmp_path / name).write_bytes(text.encode(code))
    line = 2 if code == "latin-1" else 1
    with pytest.raises(ValueError, match=rf"{name} is not UTF-8 \(line {line}\); save it as UTF-8"):
        interactions.read(tmp_path)


def test_ids_of_lightgcn_text_that_were_never_numbered_are_refused(tmp_path):
    write(tmp_path, train_txt="0 1\n", test_txt=f"0 {10**12}\n")
    with pytest.raises(
        ValueError, match=r"test.txt: users and items must be numbered from 0.*, got item 1000000000000; n"
    ):
        interactions.read(tmp_path)
    write(tmp_path, train_txt=f"{10**9} 1\n", test_txt="0 2\n")
    with pytest.raises(ValueError, match=r"train.txt: users and items must be numbered.*, got user 1000000000; number"):
        interactions.read(tmp_path)
    write(tmp_path, train_txt="0 1 999999\n")
    assert pairs(interactions.read(tmp_path).parts["train"]) == [(0, 1), (0, 999_999)]


def test_several_tables_say_how_parts_are_given(tmp_path):
    write(tmp_path, train_csv="user,item\n1,2\n", test_csv="user,item\n1,2\n")
    with pytest.raises(ValueError, match=r"the interactions. Parts are read from RecBole .*NAME.train.inter.*LightGCN"):
        interactions.read(tmp_path)


@pytest.mark.parametrize(
    ("ratings", "likes", "kept"),
    [
        ((0, 1, 1), 1, 2),
        ((-1, 0, 1), 1, 1),
        ((-1.0, 1.0, -1.0), 1, 1),
        ((1, 1, 1), None, 3),  # all were chosen
        ((0, 0.5, 1), None, 3),
        ((0, 0, 0), None, 3),
        ((1, 3, 5), 4, 1),
        ((1, 8, 10), 7, 2),
        ((0, 60, 100), None, 3),
        ((1, 11, 13_176), None, 3),  # plays of a song
    ],
)
def test_which_ratings_count(tmp_path, ratings, likes, kept):
    rows = [f"{user},{user}{item}{number},{rating}" for user in "ab" for item in range(9)
            for number, rating in enumerate(ratings)]  # fmt: skip
    path = tmp_path / "shop.csv"
    path.write_text("\n".join(["user,item,rating", *rows]))
    assert interactions.read(path).likes == likes
    task = data.load("rankings", path)
    assert sum(task.meta["pairs"].values()) == 18 * kept and task.meta["below_the_rating"] == 18 * (3 - kept)
    assert task.meta["min_rating"] == likes
    all_taken = data.load("rankings", path, min_rating=-1)
    assert sum(all_taken.meta["pairs"].values()) == 54


def test_what_the_rating_left_out_is_said_where_nothing_is_left(tmp_path):
    path = tmp_path / "shop.csv"
    path.write_text("\n".join(["user,item,rating", *(f"1,{item},3" for item in range(9)), "1,9,4", "1,10,5"]))
    with pytest.raises(ValueError, match=r"a user needs 5 .*; 9 pairs rated below 4 do not count; .*--min-rating"):
        data.load("rankings", path)
    path.write_text("\n".join(["user,item,rating", *(f"1,{item},3" for item in range(9))]))
    with pytest.raises(ValueError, match=r"no interaction is left; lower min_rating \(--min-rating\): 9 .* below 4"):
        data.load("rankings", path)
