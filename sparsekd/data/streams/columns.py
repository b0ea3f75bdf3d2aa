"""Which columns of a table are what, and the numbers that are made of their texts.

Names in this file: N rows, F numeric features, C columns of ids (user, item and the categorical ones).
"""

from __future__ import annotations

import hashlib
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

Column = Sequence[str] | np.ndarray  # texts of a CSV file, or what Parquet holds
_WHOLE = re.compile(r"-?\d{1,18}(\.0*)?")
_LONG = 10**18  # from this number on an id has more than 18 digits, and is hashed as a text is
_DATE = re.compile(
    r"(?P<day>\d{4}-\d\d(?:-\d\d)?)"
    r"(?:[T ]+(?P<time>\d\d(?::\d\d(?::\d\d(?:\.\d*)?)?)?)"
    r"(?: *(?P<sign>[+-])(?P<hours>\d\d):?(?P<minutes>\d\d)?)?)? *Z?"
)


@dataclass(frozen=True)
class Events:
    """N rows of a stream, in the order in which they came.

    times float64 [N] in seconds, clicks float32 [N], numeric float32 [N, F], ids int64 [N, C]: user, item, the others.
    Without any number there is one column of zeros, so that every network has two inputs.
    """

    times: np.ndarray
    clicks: np.ndarray
    numeric: np.ndarray
    ids: np.ndarray

    def __len__(self) -> int:
        return len(self.times)

    def take(self, rows: slice | np.ndarray) -> Events:
        return Events(self.times[rows], self.clicks[rows], self.numeric[rows], self.ids[rows])

    @classmethod
    def join(cls, parts: Sequence[Events]) -> Events:
        names = ("times", "clicks", "numeric", "ids")
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


@dataclass(frozen=True)
class Columns:
    """What the columns of a stream are called, and what they mean.

    user, item   ids: whole numbers stay what they are, any other text is hashed to 63 bits; an empty one is an id, too.
    timestamp    seconds, or a date such as 2009-12-01 07:45:00, which is UTC where it names no zone (+01:00).
    label        0 or 1; None: every row is a click, and rows without one are drawn (see `EventStream`).
    click_at     of labels that are numbers, such as ratings: from this one on it is a click.
    numeric, categorical   further columns; None takes all others: numeric is one whose first rows are all numbers. One
                 that is empty in some of these, or that Parquet holds as dates, has to be named.
    of_item      those of them that belong to the item: a drawn row has them from where its item is taken.
    missing      what stands for an empty or NaN number; None refuses these.
    """

    user: str = "user"
    item: str = "item"
    timestamp: str = "timestamp"
    label: str | None = "label"
    click_at: float | None = None
    numeric: tuple[str, ...] | None = None
    categorical: tuple[str, ...] | None = None
    of_item: tuple[str, ...] = ()
    missing: float | None = None

    def __post_init__(self) -> None:
        named = [*self.needed(), *(self.numeric or ()), *(self.categorical or ())]
        twice = sorted({name for name in named if named.count(name) > 1})
        if twice:
            raise ValueError(f"sparsekd.data.Columns: each column has one meaning, got {', '.join(twice)} twice")
        if self.click_at is not None and self.label is None:
            raise ValueError("sparsekd.data.Columns: click_at reads the label, and there is none; name it with label=")
        for option in ("click_at", "missing"):
            number = getattr(self, option)
            if number is not None and not math.isfinite(number):
                raise ValueError(f"sparsekd.data.Columns: {option} must be a finite number, got {number}")

    def needed(self) -> tuple[str, ...]:
        return tuple(name for name in (self.user, self.item, self.timestamp, self.label) if name is not None)

    def settled(self, where: str, table: Mapping[str, Column]) -> Columns:
        """With the further columns named, by the first rows of a stream.  ValueError where a named one is missing, or
        where it is not clear what one holds."""
        self.check_header(where, table)
        self._check_click_at(where, table)
        others = [name for name in table if name not in (*self.needed(), *(self.numeric or ()))]
        if self.numeric is None:
            taken = (*self.needed(), *(self.categorical or ()))
            numeric = tuple(
                name for name in table if name not in taken and _is_numeric(where, name, table[name], self.missing)
            )
        else:
            numeric = self.numeric
        categorical = self.categorical
        if categorical is None:
            categorical = tuple(name for name in others if name not in numeric)
        unknown = [name for name in self.of_item if name not in (*numeric, *categorical)]
        if unknown:
            raise ValueError(
                f"sparsekd.data.Columns: of_item names {', '.join(unknown)}, which is no further column; "
                f"those are {', '.join((*numeric, *categorical)) or 'none'}"
            )
        return replace(self, numeric=numeric, categorical=categorical)

    def in_words(self, header: Sequence[str]) -> str:
        """What every column of a header is taken for; of columns that are settled."""
        meaning = {self.user: "user", self.item: "item", self.timestamp: "time"}
        if self.label is not None:
            meaning[self.label] = "label" if self.click_at is None else f"label, a click from {self.click_at:g} on"
        for names, kind in ((self.numeric or (), "number"), (self.categorical or (), "ids")):
            meaning |= {name: f"{kind} of the item" if name in self.of_item else kind for name in names}
        return ", ".join(f"{name} ({meaning.get(name, 'not read')})" for name in header)

    def check_header(self, where: str, header: Mapping[str, Any] | Sequence[str]) -> None:
        wanted = (*self.needed(), *(self.numeric or ()), *(self.categorical or ()))
        missing = [name for name in wanted if name not in header]
        if missing:
            raise ValueError(
                f"sparsekd.data.EventStream: {where} lacks the column(s) {', '.join(missing)}, its header has "
                f"{', '.join(header)}; every file of a stream has the same columns, Columns(...) names them"
            )

    def events(self, where: str, first: int, table: Mapping[str, Column]) -> Events:
        """The rows of a table, the first of which is row `first` (from 1) of the file `where`."""
        numbers = [self._number(where, first, name, table[name]) for name in self.numeric or ()]
        ids = [_ids(table[name]) for name in (self.user, self.item, *(self.categorical or ()))]
        times = _times(where, first, self.timestamp, table[self.timestamp])
        return Events(
            times,
            self._clicks(where, first, table),
            np.stack(numbers or [np.zeros(len(times))], 1).astype(np.float32),
            np.stack(ids, 1),
        )

    def places_of_item(self) -> tuple[list[int], list[int]]:
        """Columns of `numeric` and of `ids` that go with the item, the item itself among them."""
        numeric = [place for place, name in enumerate(self.numeric or ()) if name in self.of_item]
        ids = [1, *(2 + place for place, name in enumerate(self.categorical or ()) if name in self.of_item)]
        return numeric, ids

    def _check_click_at(self, where: str, table: Mapping[str, Column]) -> None:
        """Warn where labels are 0 and 1, and `click_at` makes all of them the same."""
        if self.click_at is None or self.label is None or 0 < self.click_at <= 1:
            return
        try:
            found = set(np.asarray(table[self.label]).astype(np.float64).tolist())
        except (ValueError, TypeError):
            return  # said with its row when it is read
        if found == {0.0, 1.0}:
            warnings.warn(
                f"sparsekd.data.EventStream: the labels in {where} are 0 and 1, and click_at={self.click_at:g} makes "
                f"{'every row a click' if self.click_at <= 0 else 'no row a click'}; leave click_at (--click-at) away",
                stacklevel=2,
            )

    def _number(self, where: str, first: int, name: str, column: Column) -> np.ndarray:
        stands = "say what stands for it: Columns(missing=0.0), --missing 0"
        remedy = f"correct the file, {stands}, or {_OF_IDS}"
        values = _floats(where, first, name, column, self.missing, "a number", remedy)
        if self.missing is not None:
            values = np.where(np.isnan(values), self.missing, values)
        wrong = np.flatnonzero(~(np.abs(values) < 3e38))  # what float32 holds
        if len(wrong):
            row = int(wrong[0])
            raise ValueError(
                f"sparsekd.data.EventStream: {where} row {first + row}: {name} must be a finite number, got "
                f"{_shown(column[row])}; correct the file, or {stands}"
            )
        return values

    def _clicks(self, where: str, first: int, table: Mapping[str, Column]) -> np.ndarray:
        if self.label is None:
            return np.ones(len(table[self.user]), np.float32)
        column, wanted, remedy = table[self.label], "a number", "correct or drop the row"
        if self.click_at is None:
            wanted = "0 or 1"
            remedy += "; of ratings say from where on they are a click: Columns(click_at=4), --click-at 4"
        values = _floats(where, first, self.label, column, None, wanted, remedy)
        good = np.isfinite(values) if self.click_at is not None else (values == 0) | (values == 1)
        wrong = np.flatnonzero(~good)
        if len(wrong):
            row = int(wrong[0])
            raise ValueError(
                f"sparsekd.data.EventStream: {where} row {first + row}: {self.label} must be {wanted}, got "
                f"{_shown(column[row])}; {remedy}"
            )
        return (values if self.click_at is None else values >= self.click_at).astype(np.float32)


_OF_IDS = "name it with all other columns of ids: Columns(categorical=...), --categorical"


def _is_numeric(where: str, name: str, column: Column, missing: float | None) -> bool:
    """Whether the first rows of a column are numbers.  ValueError where they may be meant as something else."""
    if isinstance(column, np.ndarray) and column.dtype.kind == "M":
        raise ValueError(
            f"sparsekd.data.EventStream: {where}: {name} holds dates, which are features of no kind by themselves; "
            "name all columns that are features, and it among the numbers to have it in seconds: Columns(numeric=..., "
            "categorical=...), --numeric and --categorical"
        )
    if isinstance(column, np.ndarray) and column.dtype.kind in "biuf":
        return True
    there = [value not in ("", None) for value in column]
    try:
        np.array([value for value, is_there in zip(column, there, strict=True) if is_there], np.float64)
    except (ValueError, TypeError):
        return False
    if missing is None and any(there) and not all(there):
        raise ValueError(
            f"sparsekd.data.EventStream: {where} row {there.index(False) + 1}: {name} is empty, and a number in other "
            "rows; say what stands for an empty number: Columns(missing=0.0), --missing 0; or if it holds ids, "
            f"{_OF_IDS}"
        )
    return any(there) or missing is not None


def _floats(
    where: str, first: int, name: str, column: Column, blank: float | None, wanted: str, remedy: str
) -> np.ndarray:
    """float64 [N]; an empty text is `blank`, and an error without; a date is seconds."""
    if isinstance(column, np.ndarray) and column.dtype.kind in "biuf":
        return column.astype(np.float64)
    if isinstance(column, np.ndarray) and column.dtype.kind == "M":
        return _seconds(column)
    texts = list(column) if blank is None else [blank if value in ("", None) else value for value in column]
    try:
        return np.array(texts, np.float64)
    except (ValueError, TypeError):
        for row, text in enumerate(texts):
            try:
                float(text)
            except (ValueError, TypeError):
                raise ValueError(
                    f"sparsekd.data.EventStream: {where} row {first + row}: {name} must be {wanted}, got "
                    f"{_shown(text)}; {remedy}"
                ) from None
        raise


def _shown(value: Any) -> str:
    if value is None or value != value:  # NaN and NaT
        return "no value"
    return repr(value.item() if isinstance(value, np.generic) else value)


def _seconds(column: np.ndarray) -> np.ndarray:
    """float64 of what Parquet holds as times, NaN where there is none."""
    seconds = column.astype("datetime64[us]").astype(np.int64) / 1e6
    seconds[np.isnat(column)] = np.nan
    return seconds


def _times(where: str, first: int, name: str, column: Column) -> np.ndarray:
    """Seconds, float64 [N]."""
    if isinstance(column, np.ndarray) and column.dtype.kind in "iuf":
        times = column.astype(np.float64)
    elif isinstance(column, np.ndarray) and column.dtype.kind == "M":
        times = _seconds(column)
    else:
        try:
            times = np.array(column, np.float64)
        except (ValueError, TypeError):
            times = np.array([_date(where, first + row, name, text) for row, text in enumerate(column)])
    wrong = np.flatnonzero(~np.isfinite(times))
    if len(wrong):
        raise _no_time(where, first + int(wrong[0]), name, column[int(wrong[0])])
    return times


def _date(where: str, row: int, name: str, value: Any) -> float:
    """Seconds of a text, which is a date or a number.  numpy would take "", NaT, today and now for dates, too."""
    text = str(value).strip()
    found = _DATE.fullmatch(text)
    try:
        if found is None:
            return float(text)
        moment = np.datetime64(f"{found['day']}T{found['time']}" if found["time"] else found["day"], "us")
    except ValueError:
        raise _no_time(where, row, name, value) from None
    ahead = int(found["hours"] or 0) * 3600 + int(found["minutes"] or 0) * 60
    return float(moment.astype(np.int64)) / 1e6 - (ahead if found["sign"] != "-" else -ahead)


def _no_time(where: str, row: int, name: str, value: Any) -> ValueError:
    return ValueError(
        f"sparsekd.data.EventStream: {where} row {row}: {name} must be seconds or a date such as 2009-12-01 07:45:00, "
        f"got {_shown(value)}; correct or drop the row"
    )


def _ids(column: Column) -> np.ndarray:
    """int64 [N]: the number itself where it is a whole one of 18 digits at most, else a hash: the same in every file of
    any kind, today and tomorrow."""
    values = np.asarray(column)
    if values.dtype.kind in "iub" and not _any_long(values):
        return values.astype(np.int64)
    distinct, place = np.unique(values.astype(str), return_inverse=True)
    return np.array([_id(str(text)) for text in distinct], np.int64)[place]


def _any_long(values: np.ndarray) -> bool:
    if values.dtype.itemsize < 8 or not len(values):
        return False
    return int(values.max()) >= _LONG or int(values.min()) <= -_LONG


def _id(text: str) -> int:
    text = text.strip()
    if _WHOLE.fullmatch(text):
        return int(text.partition(".")[0])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
