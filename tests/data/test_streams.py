"""Streams are read window by window, in order, and refuse what is no stream with the file and the row."""

import gzip
import lzma
import threading
import time
from itertools import pairwise

import numpy as np
import pytest
import torch

from sparsekd import checkpoint
from sparsekd.data import streams
from sparsekd.data.streams import Columns, EventStream, drift, files

HEADER = "user,item,timestamp,label,price,country"


def rows_of(first, count, step=1):
    return [
        f"u{n % 5},{n % 7},{n * step},{n % 2},{n / 8},{'AT' if n % 3 else 'DE'}" for n in range(first, first + count)
    ]


def write(path, rows, header=HEADER, end="\n"):
    path.write_text("\n".join([header, *rows]) + end)
    return path


def everything(stream):
    windows = list(stream)
    numeric, ids = (torch.cat([w.rows.inputs[place] for w in windows]) for place in (0, 1))
    return windows, numeric, ids, torch.cat([w.rows.target for w in windows])


def same(windows, others):
    return len(windows) == len(others) and all(
        (a.start, a.end) == (b.start, b.end)
        and torch.equal(a.rows.target, b.rows.target)
        and all(torch.equal(x, y) for x, y in zip(a.rows.inputs, b.rows.inputs, strict=True))
        for a, b in zip(windows, others, strict=True)
    )


def test_rows_come_in_windows_of_seconds_with_their_columns(tmp_path):
    stream = EventStream([write(tmp_path / "a.csv", rows_of(0, 25))], window=10.0)
    windows, numeric, ids, clicks = everything(stream)
    assert [(w.start, w.end, len(w)) for w in windows[:2]] == [(0.0, 10.0, 10), (10.0, 20.0, 10)]
    assert windows[2].start == 20.0 and len(windows[2]) == 5
    assert numeric.flatten().tolist() == [n / 8 for n in range(25)]
    assert ids[:, 1].tolist() == [n % 7 for n in range(25)]  # whole numbers stay what they are
    assert ids[0, 0] == ids[5, 0] != ids[1, 0] and ids[1, 2] == ids[2, 2] != ids[0, 2]  # texts are hashed
    assert clicks.tolist() == [n % 2 for n in range(25)]
    assert stream.sizes == {"numeric": 1, "ids": 3}


def test_windows_of_rows_keep_those_of_one_moment_together(tmp_path):
    rows = [f"1,1,{n // 3},{n % 2},0,AT" for n in range(20)]
    windows = list(EventStream([write(tmp_path / "a.csv", rows)], rows=7))
    assert [len(w) for w in windows] == [6, 6, 6, 2]
    assert all(after.start >= before.end for before, after in pairwise(windows))


def test_a_window_is_never_read_with_the_rest(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PIECE", 16)
    path = write(tmp_path / "a.csv", rows_of(0, 1_000))
    read, pieces = [], files.pieces
    monkeypatch.setattr(
        "sparsekd.data.streams.windows.pieces",
        lambda *given: ((read.append(first), (first, table))[1] for first, table in pieces(*given)),
    )
    next(iter(EventStream([path], rows=32)))
    assert max(read) < 64


@pytest.mark.parametrize("kind", [".csv.gz", ".csv.xz", ".parquet"])
def test_other_kinds_of_files_give_the_same_rows(kind, tmp_path):
    plain = write(tmp_path / "plain.csv", rows_of(0, 50))
    path = tmp_path / f"other{kind}"
    if kind == ".parquet":
        pytest.importorskip("pyarrow")
        from pyarrow import csv, parquet

        parquet.write_table(csv.read_csv(plain), path, row_group_size=7)
    else:
        path.write_bytes({".csv.gz": gzip.compress, ".csv.xz": lzma.compress}[kind](plain.read_bytes()))
    assert same(list(EventStream([plain], rows=8)), list(EventStream([path], rows=8)))
    half = EventStream([path], rows=8)
    first = next(iter(half))
    state = half.state_dict()
    other = EventStream([path], rows=8)
    other.load_state_dict(state)
    assert same([first, *other], list(EventStream([plain], rows=8)))


def test_several_files_are_one_stream_and_a_state_goes_on_in_any_of_them(tmp_path):
    whole = EventStream([write(tmp_path / "whole.csv", rows_of(0, 100))], rows=9)
    parts = [write(tmp_path / f"{first:03}.part.csv", rows_of(first, 25)) for first in range(0, 100, 25)]
    windows = list(whole)
    assert same(windows, list(EventStream(parts, rows=9)))
    stream = EventStream(parts, rows=9)
    states = []
    for _ in stream:
        states.append(stream.state_dict())
    for number, state in enumerate(states, 1):
        resumed = EventStream(parts, rows=9)
        resumed.load_state_dict(state)
        assert same(windows[number:], list(resumed))


def test_dates_are_times(tmp_path):
    rows = ["1,1,2009-12-01 07:45:00,1,0,AT", "1,2,2009-12-01 07:45:01.5,0,0,AT", "1,2,2009-12-01T07:46:00Z,0,0,AT"]
    (window,) = EventStream([write(tmp_path / "a.csv", rows)], rows=100)
    assert window.start == 1259653500.0 and window.end == pytest.approx(window.start + 60)


def test_a_growing_directory_gives_new_files_and_waits_for_those_being_written(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    write(folder / "0.csv", rows_of(0, 20))

    def produce():
        time.sleep(0.3)
        whole = "\n".join([HEADER, *rows_of(20, 20)]) + "\n"
        path = folder / "1.csv"
        path.write_text(whole[:-9])
        (folder / "2.csv.part").write_text("nobody reads this")
        time.sleep(0.4)
        path.write_text(whole)

    thread = threading.Thread(target=produce)
    thread.start()
    windows = list(EventStream([folder], rows=8, follow=1.5))
    thread.join()
    assert same(windows, list(EventStream([write(tmp_path / "whole.csv", rows_of(0, 40))], rows=8)))


def test_a_stream_goes_on_when_files_have_been_added(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    write(folder / "0.csv", rows_of(0, 24))
    stream = EventStream([folder], rows=8)
    before = list(stream)
    write(folder / "1.csv", rows_of(24, 24))
    later = EventStream([folder], rows=8)
    later.load_state_dict(stream.state_dict())
    after = list(later)
    assert sum(map(len, before)) == 24 and sum(map(len, after)) == 24
    assert after[0].start >= before[-1].end


def test_without_a_label_items_of_earlier_clicks_are_drawn(tmp_path):
    rows = [f"{n % 4},{n % 50},{n},{n % 50 / 10},{'AT' if n % 4 else 'DE'}" for n in range(300)]
    path = write(tmp_path / "a.csv", rows, "user,item,timestamp,price,country")
    options = {"columns": Columns(label=None, of_item=("price",)), "rows": 50, "negatives": 2}
    windows, numeric, ids, clicks = everything(EventStream([path], **options))
    assert clicks.sum() == 300 and 1.8 < len(clicks) / 300 - 1 <= 2.0
    assert torch.equal(numeric.flatten(), (ids[:, 1] / 10).float())  # what belongs to the item goes with it
    for row in torch.nonzero(clicks == 0).flatten().tolist():  # items that came before, but not to this user
        before = ids[:row][clicks[:row] == 1]
        assert int(ids[row, 1]) in before[:, 1].tolist()
        assert not (before[:, :2] == ids[row, :2]).all(1).any()
    stream = EventStream([path], **options)
    next(iter(stream))
    resumed = EventStream([path], **options)
    resumed.load_state_dict(stream.state_dict())
    assert same(windows[1:], list(resumed))


BAD = {
    "row 3: time must not fall, got 1 after 2": ["1,1,1,0,0,A", "1,1,2,1,0,A", "1,1,1,0,0,A"],
    "row 2: label must be 0 or 1, got '2'": ["1,1,1,0,0,A", "1,1,2,2,0,A"],
    "row 2: price must be a finite number, got 'nan'": ["1,1,1,0,0,A", "1,1,2,1,nan,A"],
    "row 2: price must be a number, got ''": ["1,1,1,0,0,A", "1,1,2,1,,A"],
    "row 1: timestamp must be seconds or a date": ["1,1,yesterday,0,0,A", "1,1,2,1,0,A"],
    "line 3: expected 6 fields, got 4; it is cut short, or still being written": ["1,1,1,0,0,A", "1,1,2,1"],
    "line 2: expected 6 fields, got 4; its quoting is broken": ["1,1,2,1", "1,1,1,0,0,A"],
}


@pytest.mark.parametrize("message", BAD)
def test_rows_that_are_no_stream_are_refused_with_file_and_row(message, tmp_path):
    path = write(tmp_path / "bad.csv", BAD[message])
    with pytest.raises(ValueError, match=rf"bad\.csv {message}"):
        list(EventStream([path], Columns(numeric=("price",)), rows=10))


def test_files_that_are_no_stream_are_refused(tmp_path):
    first = write(tmp_path / "0.csv", rows_of(0, 20))
    lacking = write(tmp_path / "1.csv", ["1,1,100,0,1", "1,1,101,0,1"], "user,item,timestamp,label,price")
    with pytest.raises(ValueError, match=r"1\.csv lacks the column\(s\) country.*every file of a stream has the same"):
        list(EventStream([first, lacking], rows=8))
    with pytest.raises(ValueError, match=r"1\.csv row 1: time must not fall, got 0 after 19"):
        list(EventStream([first, write(tmp_path / "1.csv", rows_of(0, 5))], rows=8))
    with pytest.raises(ValueError, match=r"lacks the column\(s\) clicked"):
        list(EventStream([first], Columns(label="clicked"), rows=8))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        EventStream([tmp_path / "nowhere.csv"], rows=8)
    with pytest.raises(ValueError, match="no header line; it is empty, or still being written"):
        list(EventStream([write(tmp_path / "2.csv", [], "", "")], rows=8))
    broken = tmp_path / "3.csv.gz"
    broken.write_bytes(gzip.compress(first.read_bytes())[:-20])
    with pytest.raises(ValueError, match=r"3\.csv\.gz cannot be read to its end.*still being written"):
        list(EventStream([broken], rows=8))


def test_a_parquet_file_that_is_being_written_is_refused(tmp_path):
    pytest.importorskip("pyarrow")
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 and no end")
    with pytest.raises(ValueError, match=r"no whole Parquet file.*still being written"):
        list(EventStream([path], rows=8))


def test_a_state_of_other_columns_or_of_a_lost_file_is_refused(tmp_path):
    path = write(tmp_path / "a.csv", rows_of(0, 40))
    stream = EventStream([path], rows=8)
    next(iter(stream))
    state = stream.state_dict()
    with pytest.raises(ValueError, match=r"with other columns: numeric \['price'\], now \[\]; .* begin anew"):
        EventStream([path], Columns(numeric=(), categorical=()), rows=8).load_state_dict(state)
    other = EventStream([write(tmp_path / "b.csv", rows_of(0, 40))], rows=8)
    other.load_state_dict(state)
    with pytest.raises(ValueError, match=r"read up to .*a\.csv, which is not there any more"):
        list(other)


def test_a_state_is_of_columns_that_mean_the_same(tmp_path):
    path = write(tmp_path / "a.csv", rows_of(0, 40))
    stream = EventStream([path], Columns(missing=0.0, of_item=("price",)), rows=8)
    next(iter(stream))
    checkpoint.save_state(stream.state_dict(), tmp_path / "state")
    state = checkpoint.load_state(tmp_path / "state")
    again = EventStream([path], Columns(missing=0.0, of_item=("price",)), rows=8)
    again.load_state_dict(state)
    assert same(list(stream), list(again))
    for columns, message in (
        (
            Columns(missing=0.0, of_item=("price",), user="item", item="user"),
            "user user, now item; item item, now user",
        ),
        (Columns(missing=9.0, of_item=("price",)), r"missing 0\.0, now 9\.0"),
        (Columns(missing=0.0), r"of_item \['price'\], now \[\]"),
        (Columns(missing=0.0, of_item=("price",), click_at=1.0), r"click_at None, now 1\.0"),
    ):
        other = EventStream([path], columns, rows=8)
        assert other.describe() != stream.describe()  # which a run compares
        with pytest.raises(ValueError, match=f"a stream with other columns: {message}; read the same"):
            other.load_state_dict(state)
    old = {name: value for name, value in state.items() if name != "columns"} | {"numeric": [], "categorical": []}
    with pytest.raises(ValueError, match=r"of an earlier version of sparsekd, .* or begin anew"):
        again.load_state_dict(old)


@pytest.mark.parametrize("options", [{"rows": 8}, {"window": 10.0}, {"window": 1e6}])
@pytest.mark.parametrize("grows", ["the folder", "the file"])
def test_a_stream_goes_on_with_rows_of_the_very_time_at_which_it_ended(options, grows, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    days = [rows_of(0, 34), [f"1,{n},33,{n % 2},0.5,AT" for n in range(3)], ["1,1,33,0,0.5,AT", *rows_of(33, 9)]]
    found, states = [], []
    for number, rows in enumerate(days):
        if grows == "the folder":
            write(folder / f"{number}.csv", rows)
        else:
            write(folder / "0.csv", [row for day in days[: number + 1] for row in day])
        stream = EventStream([folder], **options)
        if states:
            stream.load_state_dict(states[-1])
        found += list(stream)
        states.append(stream.state_dict())
    assert sum(map(len, found)) == 34 + 3 + 10
    assert all(after.start >= before.end and after.end >= after.start for before, after in pairwise(found))
    write(folder / "3.csv", ["1,1,32.999,0,0.5,AT"] * 3)
    stream = EventStream([folder], **options)
    stream.load_state_dict(states[0])
    if grows == "the folder":
        (folder / "1.csv").unlink()
        (folder / "2.csv").unlink()
        with pytest.raises(ValueError, match=r"3\.csv row 1: time must not fall, got 32\.999\d* after 33;"):
            list(stream)


@pytest.mark.parametrize("kind", [".csv", ".csv.gz", ".parquet"])
def test_a_file_that_was_cut_behind_what_has_been_read_is_refused(kind, tmp_path):
    path = tmp_path / f"a{kind}"

    def write_rows(count):
        plain = write(tmp_path / "plain.csv.part", rows_of(0, count))
        if kind == ".parquet":
            pytest.importorskip("pyarrow")
            from pyarrow import csv, parquet

            parquet.write_table(csv.read_csv(plain), path, row_group_size=7)
        else:
            path.write_bytes(plain.read_bytes() if kind == ".csv" else gzip.compress(plain.read_bytes()))

    write_rows(103)
    stream = EventStream([path], rows=8)
    assert sum(map(len, stream)) == 103
    for rows in (103, 110):
        write_rows(rows)
        later = EventStream([path], rows=8)
        later.load_state_dict(stream.state_dict())
        assert sum(map(len, later)) == rows - 103
    write_rows(19)
    later = EventStream([path], rows=8)
    later.load_state_dict(stream.state_dict())
    with pytest.raises(ValueError, match=r"has 19 rows, and the stream has been read up to row 103 of it; put back"):
        list(later)


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "in seconds or in rows"),
        ({"window": float("inf")}, "window must be at least 1e-06, got inf"),
        ({"rows": 4, "follow": -1.0}, "follow must be seconds, 0 or more, got -1"),
        ({"rows": 1}, "rows must be at least 2"),
        ({"window": 0.0}, "window must be at least"),
    ],
)
def test_windows_that_mean_nothing_are_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        EventStream([write(tmp_path / "a.csv", rows_of(0, 4))], **options)


def test_movietweetings_is_a_stream_of_clicks():
    stream = streams.known("movietweetings")
    windows, numeric, _, clicks = everything(stream)
    assert len(clicks) == 100_000 and clicks.sum() == 50_542
    assert stream.sizes == {"numeric": numeric.shape[1], "ids": 2} and torch.isfinite(numeric).all()
    assert all(after.start >= before.end for before, after in pairwise(windows))
    resumed = streams.known("movietweetings")
    resumed.load_state_dict({"number": len(windows) - 1})
    assert same(windows[-1:], list(resumed))


# ---- the synthetic stream


def test_the_optimum_is_what_the_true_probabilities_score():
    stream = drift.DriftingClicks("none", windows=2, rows=100_000)
    window = next(iter(stream))
    p = stream.logits(1).double().sigmoid()
    y, share = window.rows.target.double(), window.rows.target.double().mean()
    loss = -(y * p.log() + (1 - y) * (1 - p).log()).mean()
    entropy = -(share * share.log() + (1 - share) * (1 - share).log())
    assert float(loss / entropy) == pytest.approx(stream.optimum(1), rel=0.01)
    assert stream.optimum(1) < 0.9


@pytest.mark.parametrize("kind, changes", [("abrupt", [4, 7]), ("recurring", [4, 7]), ("gradual", []), ("none", [])])
def test_concepts_change_when_they_are_said_to(kind, changes):
    stream = drift.DriftingClicks(kind, windows=9, rows=16, every=3)
    assert stream.changes() == changes
    weights = [stream._concept_of(number).weight for number in range(1, 10)]
    moved = [n for n in range(2, 10) if not torch.equal(weights[n - 1], weights[n - 2])]
    assert moved == (list(range(2, 10)) if kind == "gradual" else changes)
    assert torch.equal(weights[0], weights[6]) == (kind in ("recurring", "none"))


def test_new_users_come_in_mid_stream_and_windows_are_the_same_when_drawn_again():
    stream = drift.DriftingClicks("abrupt", windows=4, rows=4_000, users=100, new_ids=10.0)
    windows = list(stream)
    seen = [set(w.rows.inputs[1][:, 0].tolist()) for w in windows]
    assert all(5 <= len(after - before) <= 10 for before, after in pairwise(seen))
    again = drift.DriftingClicks("abrupt", windows=4, rows=4_000, users=100, new_ids=10.0)
    again.load_state_dict({"number": 2})
    assert same(windows[2:], list(again))


def test_a_synthetic_stream_can_be_written_as_a_file(tmp_path):
    stream = drift.DriftingClicks("gradual", windows=3, rows=200, features=4, active=2)
    drift.write_csv(stream, tmp_path / "a.csv")
    read = list(EventStream([tmp_path / "a.csv"], window=1.0))
    for made, window in zip(stream, read, strict=True):
        assert torch.equal(made.rows.target, window.rows.target)
        assert torch.equal(made.rows.inputs[1], window.rows.inputs[1])
        assert np.allclose(made.rows.inputs[0], window.rows.inputs[0], rtol=1e-5, atol=1e-6)
