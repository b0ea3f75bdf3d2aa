"""What the columns of a stream are taken for: the same in every kind of file, and nothing that nobody meant."""

import datetime
import warnings

import pytest

from sparsekd.data.streams import Columns, EventStream

HEADER = "user,item,timestamp,label"


def write(path, rows, header=HEADER):
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def read(path, columns=None):
    (window,) = EventStream([path], columns, rows=100)
    return window


def parquet_of(path, **columns):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = len(next(iter(columns.values())))
    usual = {"user": [1] * rows, "item": [2] * rows, "timestamp": list(range(rows)), "label": [0, 1] * (rows // 2)}
    parquet.write_table(pa.table(usual | columns), path)
    return path


@pytest.mark.parametrize("text", ["", "NaT", "today", "now", " ", "2009-13-01"])
@pytest.mark.parametrize("first", ["2009-12-01 07:45:00", "17"])
def test_a_time_that_is_none_is_refused_with_file_and_row(text, first, tmp_path):
    path = write(tmp_path / "a.csv", [f"1,1,{first},0", f"1,2,{text},1"])
    with pytest.raises(
        ValueError, match=rf"a\.csv row 2: timestamp must be seconds or a date .*, got '{text}'; correct"
    ):
        read(path)


def test_an_empty_time_of_parquet_is_refused_as_well(tmp_path):
    moment = datetime.datetime(2020, 1, 1)
    with pytest.raises(ValueError, match=r"row 2: timestamp must be seconds or a date .*, got no value"):
        read(parquet_of(tmp_path / "a.parquet", timestamp=[moment, None]))


def test_dates_with_a_zone_are_converted_and_others_are_utc(tmp_path):
    moments = ["2009-12-01 07:45+01:00", "2009-12-01T06:45:01Z", "2009-12-01 06:45:02", "2009-12-01T02:15:03.5-0430"]
    path = write(tmp_path / "a.csv", [f"1,1,{moment},{n % 2}" for n, moment in enumerate(moments)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        window = read(path)
    assert window.start == 1259649900.0 and window.end == pytest.approx(window.start + 3.5)


@pytest.mark.parametrize(
    "header, name", [("user,item,timestamp,label,label", "label"), ("a,a,user,item,timestamp", "a")]
)
def test_two_columns_of_one_name_are_refused(header, name, tmp_path):
    message = rf"has several columns of the name '{name}', of which only one could be read"
    with pytest.raises(ValueError, match=rf"a\.csv {message}"):
        read(write(tmp_path / "a.csv", ["1,2,3,0,1", "1,2,4,1,0"], header))
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    names = header.split(",")
    parquet.write_table(pa.table([pa.array([0, 1])] * len(names), names), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=rf"a\.parquet {message}"):
        read(tmp_path / "a.parquet")


def test_an_empty_cell_among_numbers_has_to_be_explained(tmp_path):
    path = write(tmp_path / "a.csv", ["1,1,1,0,2.5", "1,1,2,1,", "1,2,3,1,4"], HEADER + ",p")
    with pytest.raises(ValueError, match=r"a\.csv row 2: p is empty, .* --missing 0; .* ids, .* --categorical"):
        read(path)
    assert read(path, Columns(missing=-1.0)).rows.inputs[0].flatten().tolist() == [2.5, -1.0, 4.0]
    assert read(path, Columns(categorical=("p",))).rows.inputs[1].shape == (3, 3)
    empty = write(tmp_path / "b.csv", ["1,1,1,0,", "1,1,2,1,"], HEADER + ",p")
    assert read(empty).rows.inputs[1].shape == (2, 3)  # nothing speaks for numbers


def test_an_empty_whole_number_of_parquet_has_to_be_explained(tmp_path):
    path = parquet_of(tmp_path / "a.parquet", p=[7, None, 9, 3])
    with pytest.raises(ValueError, match=r"a\.parquet row 2: p is empty, and a number in other rows"):
        read(path)
    assert read(path, Columns(missing=0.0)).rows.inputs[0].flatten().tolist() == [7.0, 0.0, 9.0, 3.0]


def test_dates_of_parquet_are_seconds_among_the_numbers_and_never_by_themselves(tmp_path):
    moments = [datetime.datetime(1970, 1, 1, 0, 0, 5), datetime.datetime(1970, 1, 1, 0, 1)]
    path = parquet_of(tmp_path / "a.parquet", made=moments)
    with pytest.raises(ValueError, match=r"made holds dates, .* --numeric and --categorical"):
        read(path)
    assert read(path, Columns(numeric=("made",))).rows.inputs[0].flatten().tolist() == [5.0, 60.0]
    gap = parquet_of(tmp_path / "b.parquet", made=[moments[0], None])
    with pytest.raises(ValueError, match=r"row 2: made must be a finite number, got no value"):
        read(gap, Columns(numeric=("made",)))


def test_long_ids_are_the_same_in_every_kind_of_file(tmp_path):
    pa = pytest.importorskip("pyarrow")
    users, items = [2**63 + 5, 2**64 - 1, 7, 10**18 - 1], [10**18, -(10**18), 1 - 10**18, 3]
    plain = write(
        tmp_path / "a.csv", [f"{u},{i},{n},{n % 2}" for n, (u, i) in enumerate(zip(users, items, strict=True))]
    )
    packed = parquet_of(tmp_path / "a.parquet", user=pa.array(users, pa.uint64()), item=items)
    ids = read(packed).rows.inputs[1]
    assert ids.tolist() == read(plain).rows.inputs[1].tolist()
    assert ids[2:, 0].tolist() == users[2:] and ids[2:, 1].tolist() == items[2:] and int(ids[:2, 0].min()) >= 0


def test_labels_that_are_none_say_what_to_do(tmp_path):
    path = write(tmp_path / "a.csv", ["1,1,1,0", "1,1,2,"])
    with pytest.raises(
        ValueError, match=r"a\.csv row 2: label must be 0 or 1, got ''; correct or drop the row; of ratings"
    ):
        read(path)
    with pytest.raises(ValueError, match=r"row 2: label must be a number, got ''; correct or drop the row$"):
        read(path, Columns(click_at=1.0))
    with pytest.raises(ValueError, match=r"row 2: label must be 0 or 1, got no value"):
        read(parquet_of(tmp_path / "a.parquet", label=[0.0, None]))


def test_a_threshold_that_makes_all_labels_the_same_is_warned_of(tmp_path):
    path = write(tmp_path / "a.csv", ["1,1,1,0", "1,1,2,1"])
    with pytest.warns(UserWarning, match=r"the labels in .*a\.csv are 0 and 1, and click_at=3 makes no row a click"):
        read(path, Columns(click_at=3.0))
    ratings = write(tmp_path / "b.csv", ["1,1,1,0", "1,1,2,1", "1,1,2,5"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(ratings, Columns(click_at=3.0)).rows.target.tolist() == [0, 0, 1]
        read(path, Columns(click_at=1.0))
    for options in ({"missing": float("nan")}, {"click_at": float("inf")}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be a finite number"):
            Columns(**options)


def test_a_damaged_page_of_parquet_names_the_file(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path, count = tmp_path / "a.parquet", 5_000
    columns = {"user": range(count), "item": range(count), "timestamp": range(count), "label": [0, 1] * (count // 2)}
    parquet.write_table(
        pa.table({k: list(v) for k, v in columns.items()}), path, compression="snappy", use_dictionary=False
    )
    data = bytearray(path.read_bytes())
    data[200:4_000] = bytes(b ^ 0xFF for b in data[200:4_000])
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.parquet is no whole Parquet file .* it is damaged"):
        list(EventStream([path], rows=1_000))


def test_every_column_is_told_in_words(tmp_path):
    path = write(tmp_path / "a.csv", ["1,1,1,0,2.5,x,y"] * 3, HEADER + ",price,shop,note")
    words = EventStream([path], rows=2).columns_in_words()
    assert words == (
        "user (user), item (item), timestamp (time), label (label), price (number), shop (ids), note (ids)"
    )
    chosen = Columns(click_at=4, of_item=("price",), categorical=("shop",))
    words = EventStream([path], chosen, rows=2).columns_in_words()
    assert "label (label, a click from 4 on), price (number of the item), shop (ids), note (not read)" in words
