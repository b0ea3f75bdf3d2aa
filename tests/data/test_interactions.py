"""Files of interactions in every format, small and written here, and what is wrong with others."""

import gzip
import lzma
import zipfile

import numpy as np
import pytest

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
