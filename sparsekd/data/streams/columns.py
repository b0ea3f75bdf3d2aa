"""Which columns of a table are what, and the numbers that are made of their texts.

Names in this file: N rows, F numeric features, C columns of ids (user, item and the categorical ones).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

Column = Sequence[str] | np.ndarray  # texts of a CSV file, or what Parquet holds
_WHOLE = re.compile(r"-?\d{1,18}(\.0*)?")


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
    timestamp    seconds, or a date such as 2009-12-01 07:45:00 (taken as UTC).
    label        0 or 1; None: every row is a click, and rows without one are drawn (see `EventStream`).
    click_at     of labels that are numbers, such as ratings: from this one on it is a click.
    numeric, categorical   further columns; None takes all others: numeric is one whose first rows are all numbers.
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

    def needed(self) -> tuple[str, ...]:
        return tuple(name for name in (self.user, self.item, self.timestamp, self.label) if name is not None)

    def settled(self, where: str, table: Mapping[str, Column]) -> Columns:
        """With the further columns named, by the first rows of a stream.  ValueError where a named one is missing."""
        self.check_header(where, table)
        others = [name for name in table if name not in (*self.needed(), *(self.numeric or ()))]
        if self.numeric is None:
            taken = (*self.needed(), *(self.categorical or ()))
            numeric = tuple(name for name in table if name not in taken and _is_numeric(table[name], self.missing))
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

    def _number(self, where: str, first: int, name: str, column: Column) -> np.ndarray:
        values = _floats(where, first, name, column, blank=self.missing)
        if self.missing is not None:
            values = np.where(np.isnan(values), self.missing, values)
        wrong = np.flatnonzero(~(np.abs(values) < 3e38))  # what float32 holds
        if len(wrong):
            row = int(wrong[0])
            raise ValueError(
                f"sparsekd.data.EventStream: {where} row {first + row}: {name} must be a finite number, got "
                f"{column[row]!r}; correct the file, or say what stands for it: Columns(missing=0.0)"
            )
        return values

    def _clicks(self, where: str, first: int, table: Mapping[str, Column]) -> np.ndarray:
        if self.label is None:
            return np.ones(len(table[self.user]), np.float32)
        values = _floats(where, first, self.label, table[self.label], blank=None)
        good = np.isfinite(values) if self.click_at is not None else (values == 0) | (values == 1)
        wrong = np.flatnonzero(~good)
        if len(wrong):
            row = int(wrong[0])
            raise ValueError(
                f"sparsekd.data.EventStream: {where} row {first + row}: {self.label} must be "
                f"{'a number' if self.click_at is not None else '0 or 1'}, got {table[self.label][row]!r}; of ratings "
                "say from where on they are a click: Columns(click_at=4)"
            )
        return (values if self.click_at is None else values >= self.click_at).astype(np.float32)


def _is_numeric(column: Column, missing: float | None) -> bool:
    if isinstance(column, np.ndarray) and column.dtype.kind in "biuf":
        return True
    try:
        np.array([value for value in column if value or missing is None], np.float64)
    except (ValueError, TypeError):
        return False
    return True


def _floats(where: str, first: int, name: str, column: Column, blank: float | None) -> np.ndarray:
    """float64 [N]; an empty text is `blank`, and an error without."""
    if isinstance(column, np.ndarray) and column.dtype.kind in "biuf":
        return column.astype(np.float64)
    texts = list(column) if blank is None else [blank if value in ("", None) else value for value in column]
    try:
        return np.array(texts, np.float64)
    except (ValueError, TypeError):
        for row, text in enumerate(texts):
            try:
                float(text)
            except (ValueError, TypeError):
                raise ValueError(
                    f"sparsekd.data.EventStream: {where} row {first + row}: {name} must be a number, got {text!r}; "
                    "correct the file, or name it among the categorical columns"
                ) from None
        raise


def _times(where: str, first: int, name: str, column: Column) -> np.ndarray:
    """Seconds, float64 [N]."""
    if isinstance(column, np.ndarray) and column.dtype.kind in "iuf":
        times = column.astype(np.float64)
    elif isinstance(column, np.ndarray) and column.dtype.kind == "M":
        times = column.astype("datetime64[us]").astype(np.int64) / 1e6
        times[np.isnat(column)] = np.nan
    else:
        try:
            times = np.array(column, np.float64)
        except (ValueError, TypeError):
            times = np.array([_date(where, first + row, name, text) for row, text in enumerate(column)])
    wrong = np.flatnonzero(~np.isfinite(times))
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(
            f"sparsekd.data.EventStream: {where} row {first + row}: {name} must be seconds or a date, got "
            f"{column[row]!r}; correct or drop the row"
        )
    return times


def _date(where: str, row: int, name: str, text: Any) -> float:
    try:
        return float(np.datetime64(str(text).strip().removesuffix("Z"), "us").astype(np.int64)) / 1e6
    except ValueError:
        raise ValueError(
            f"sparsekd.data.EventStream: {where} row {row}: {name} must be seconds or a date such as "
            f"2009-12-01 07:45:00, got {text!r}; correct or drop the row"
        ) from None


def _ids(column: Column) -> np.ndarray:
    """int64 [N]: the number itself where it is a whole one, else a hash: the same in every file, today and tomorrow."""
    values = np.asarray(column)
    if values.dtype.kind in "iub":
        return values.astype(np.int64)
    distinct, place = np.unique(values.astype(str), return_inverse=True)
    return np.array([_id(str(text)) for text in distinct], np.int64)[place]


def _id(text: str) -> int:
    text = text.strip()
    if _WHOLE.fullmatch(text):
        return int(text.partition(".")[0])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
