"""Files of users and what they chose, in the formats that recommenders come in: columns of ids, nothing numbered yet.

    LightGCN   train.txt, test.txt, valid.txt (or val.txt): "user item item ..." a line; data1.txt, test1.txt: "user
               item count" a line (https://github.com/gusye1234/LightGCN-PyTorch)
    RecBole    one *.inter, or NAME.train.inter, NAME.valid.inter and NAME.test.inter: columns "user_id:token" and so
               on, apart by tabs (https://recbole.io/docs/user_guide/data/atomic_files.html)
    MovieLens  ratings.dat (apart by "::"; that of MovieTweetings is alike), ratings.csv, u.data, or its ml-*.zip
    tables     one *.csv, *.tsv or *.parquet with named columns

All but Parquet may be packed (.xz, .gz). Whatever is wrong with a file raises ValueError with its name and what to do.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from . import sources

__all__ = ["COLUMNS", "Interactions", "Source", "read"]

# What a column may be called where the caller does not say it, in small letters or capitals.
COLUMNS = {
    "user": ("user", "user_id", "userId", "userID", "uid", "visitor", "customer_id", "Customer ID"),
    "item": (
        "item",
        "item_id",
        "itemId",
        "itemID",
        "iid",
        "movieId",
        "movie_id",
        "business_id",
        "product_id",
        "artistID",
    ),
    "rating": ("rating", "ratings", "stars", "score", "value"),
    "time": ("timestamp", "time", "date", "ts"),
}
_NEEDED = ("user", "item")
_PACKED = (".xz", ".gz")
_MOVIELENS = {"ratings.dat": "::", "u.data": "\t", "ratings.csv": ","}  # what is between two fields
_WITHOUT_HEADINGS = {"ratings.dat", "u.data"}
_FEW_NUMBERS = 1_000_000  # every number up to the largest gets a row; so many may be there for any data
_GAPS = 10  # and as many for each pair


@dataclass(frozen=True)
class Interactions:
    """N interactions: users and items [N], int64 or text, as the file has them; ratings and times [N] or None."""

    users: np.ndarray
    items: np.ndarray
    ratings: np.ndarray | None = None
    times: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.users)

    def take(self, rows: np.ndarray) -> Interactions:
        ratings, times = (None if column is None else column[rows] for column in (self.ratings, self.times))
        return Interactions(self.users[rows], self.items[rows], ratings, times)


@dataclass(frozen=True)
class Source:
    """What a folder holds.

    parts    "train", "val" and "test" where it is split, "all" where it is not.
    kind     of the files, in words.
    numbered whether ids are numbers from 0 that must stay as they are, as in the splits that papers publish.
    likes    the rating from which such files are usually taken to mean "likes"; None where there are no ratings, or no
             scale that is known.
    sha256   of every file.
    """

    parts: dict[str, Interactions]
    kind: str
    numbered: bool = False
    likes: float | None = None
    sha256: dict[str, str] = field(default_factory=dict)


def read(folder: Path, columns: Mapping[str, str] | None = None) -> Source:
    """Read what lies in `folder` (or the one file that it is), by the first format of this module that it has.

    `columns` names those of a table: {"user": "who", "item": "what", "rating": ..., "time": ...}; without it the usual
    names are looked for. Raises FileNotFoundError where no format is there, ValueError for bad contents.
    """
    given = dict(columns or {})
    unknown = sorted(set(given) - set(COLUMNS))
    if unknown:
        raise ValueError(f"sparsekd.data: columns may name {', '.join(COLUMNS)}, got {', '.join(unknown)}")
    files = [folder] if folder.is_file() else sorted(path for path in folder.iterdir() if path.is_file())
    by_name = {_plain(path): path for path in files}
    for reader in (_lightgcn, _counted, _recbole, _movielens, _table):
        source = reader(by_name, given)
        if source is not None:
            _check_has_headings(given, source.kind)
            return source
    _check_has_headings(given, *_WITHOUT_HEADINGS.intersection(by_name))
    raise FileNotFoundError(
        f"sparsekd.data: no interactions in {folder}; expected train.txt and test.txt, *.inter, ratings.dat, "
        "ratings.csv, u.data, or one *.csv, *.tsv or *.parquet"
    )


def _check_has_headings(columns: Mapping[str, str], *kinds: str) -> None:
    for kind in kinds:
        if columns and (kind in _WITHOUT_HEADINGS or kind.startswith("LightGCN")):
            raise ValueError(
                f"sparsekd.data: columns belong to a table with a header, got {', '.join(columns)} for {kind}, which "
                "has none; leave them out"
            )


def _plain(path: Path) -> str:
    """The name without the suffix of a packer."""
    return path.stem if path.suffix in _PACKED else path.name


class _Files:
    """Opens files and remembers their sha256."""

    def __init__(self) -> None:
        self.sha256: dict[str, str] = {}

    def bytes(self, path: Path) -> bytes:
        data = path.read_bytes()
        self.sha256[path.name] = sources.sha256(data)
        return sources.unpack(path.name, data)


def _lightgcn(by_name: Mapping[str, Path], columns: Mapping[str, str]) -> Source | None:
    if not {"train.txt", "test.txt"} <= set(by_name):
        return None
    files, parts, paths = _Files(), {}, {}
    for part, names in (("train", ("train.txt",)), ("val", ("valid.txt", "val.txt")), ("test", ("test.txt",))):
        for name in names:
            if name in by_name and part not in parts:
                paths[part] = path = by_name[name]
                parts[part] = _lines_of_items(path.name, sources.text(path.name, files.bytes(path)))
    most = _FEW_NUMBERS + _GAPS * sum(map(len, parts.values()))
    for part, log in parts.items():
        _check_numbers(paths[part].name, log, most)
    return Source(parts, "LightGCN text", numbered=True, sha256=files.sha256)


def _check_numbers(name: str, log: Interactions, most: int) -> None:
    """Far too few pairs for the numbers that they have: ids that were never numbered."""
    for what, numbers in (("user", log.users), ("item", log.items)):
        if len(log) and numbers.max() >= most:
            raise ValueError(
                f"sparsekd.data: {name}: users and items must be numbered from 0, with so few pairs below {most:,}, "
                f"got {what} {numbers.max()}; number them anew, or give a table (*.csv) with columns user and item, "
                "whose ids may be any"
            )


def _lines_of_items(name: str, text: str) -> Interactions:
    users, items = [], []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            row = np.array(line.split(), dtype=np.int64)
        except (ValueError, OverflowError):
            row = np.array([-1])
        if len(row) and row.min() < 0:
            raise ValueError(
                f"sparsekd.data: {name} line {number}: expected a user and items, numbers from 0, got {line[:60]!r}; "
                "correct the file"
            )
        users.append(np.repeat(row[:1], max(len(row) - 1, 0)))
        items.append(row[1:])
    return Interactions(np.concatenate(users), np.concatenate(items))


def _counted(by_name: Mapping[str, Path], columns: Mapping[str, str]) -> Source | None:
    """Last.FM as LightGCN has it: how often a user played an artist."""
    if not {"data1.txt", "test1.txt"} <= set(by_name):
        return None
    files, parts = _Files(), {}
    for part, name in (("train", "data1.txt"), ("test", "test1.txt")):
        path = by_name[name]
        rows = _fields(path.name, files.bytes(path), None, 3)
        parts[part] = _columns(path.name, [row[0] for row in rows], [row[1] for row in rows])
    return Source(parts, "LightGCN triples", numbered=False, sha256=files.sha256)


def _recbole(by_name: Mapping[str, Path], columns: Mapping[str, str]) -> Source | None:
    atomic = {name: path for name, path in by_name.items() if name.endswith(".inter")}
    if not atomic:
        return None
    files = _Files()
    split = {part: path for name, path in atomic.items() for part in [name.removesuffix(".inter").rpartition(".")[2]]}
    known = {"train": "train", "valid": "val", "test": "test"}
    if {"train", "test"} <= set(split):
        chosen = {known[part]: path for part, path in split.items() if part in known}
    elif len(atomic) == 1:
        chosen = {"all": next(iter(atomic.values()))}
    else:
        raise ValueError(
            f"sparsekd.data: several atomic files, {', '.join(atomic)}; expected one NAME.inter, or NAME.train.inter "
            "and NAME.test.inter"
        )
    parts = {part: _named(path.name, files.bytes(path), columns, "\t", ":") for part, path in chosen.items()}
    return Source(parts, "RecBole atomic files", likes=_likes(parts), sha256=files.sha256)


def _movielens(by_name: Mapping[str, Path], columns: Mapping[str, str]) -> Source | None:
    files = _Files()
    archives = [path for name, path in by_name.items() if name.startswith("ml-") and name.endswith(".zip")]
    packed = sources.unzip(archives[0].name, files.bytes(archives[0]), list(_MOVIELENS)) if archives else {}
    for name, delimiter in _MOVIELENS.items():
        if name not in packed and (name not in by_name or columns or name.endswith(".csv")):
            continue  # a plain table, which `_table` reads
        data = packed[name] if name in packed else files.bytes(by_name[name])
        if name.endswith(".csv"):
            log = _named(name, data, columns, delimiter)
        else:
            log = _columns(name, *zip(*_fields(name, data, delimiter, 4), strict=True))
        return Source({"all": log}, f"MovieLens {name}", likes=_likes({"all": log}), sha256=files.sha256)
    return None


def _table(by_name: Mapping[str, Path], columns: Mapping[str, str]) -> Source | None:
    tables = [path for name, path in by_name.items() if name.endswith((".csv", ".tsv", ".parquet"))]
    named = [path for path in tables if _plain(path) in ("ratings.csv", "interactions.csv")]
    if len(named) != 1 and len(tables) > 1:
        names = ", ".join(path.name for path in tables)
        raise ValueError(
            f"sparsekd.data: several tables, {names}; give the path of the one with the interactions. Parts are read "
            "from RecBole atomic files (NAME.train.inter, NAME.valid.inter, NAME.test.inter: tables with tabs and "
            "headings such as user_id:token) and LightGCN text (train.txt, valid.txt, test.txt)"
        )
    if not tables:
        return None
    path, files = (named or tables)[0], _Files()
    if path.suffix == ".parquet":
        log = _parquet(path, files, columns)
    else:
        log = _named(path.name, files.bytes(path), columns, ",;\t")
    parts = {"all": log}
    return Source(parts, f"table {path.name}", likes=_likes(parts), sha256=files.sha256)


def _named(name: str, data: bytes, columns: Mapping[str, str], delimiters: str, ends: str = "") -> Interactions:
    """A table with a header; a heading ends where `ends` begins, as in user_id:token."""
    header, *rest = re.split(rb"\r\n|\r|\n", data, maxsplit=1)  # \r alone: old Mac files
    titles = sources.text(name, header)
    delimiter = max(delimiters, key=titles.count)
    written = titles.split(delimiter)
    headings = [title.strip().strip('"').strip() for title in written]
    if ends:
        headings = [heading.partition(ends)[0] for heading in headings]
    found = _found(name, headings, columns)
    plain = b"\n".join([delimiter.join(headings).encode(), *rest])
    padded = any(title != title.strip() for title in written)  # "user, item": so are the fields below
    table = sources.table(name, plain, list(found.values()), delimiter, padded)
    return _columns(name, *(table[found[what]] if what in found else () for what in COLUMNS))


def _parquet(path: Path, files: _Files, columns: Mapping[str, str]) -> Interactions:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise RuntimeError(
            f"sparsekd.data: {path.name} needs pyarrow; pip install 'sparsekd[stream]', or write the table as CSV"
        ) from error
    data = files.bytes(path)
    try:
        file = parquet.ParquetFile(io.BytesIO(data))
        found = _found(path.name, file.schema_arrow.names, columns)
        table = file.read(columns=list(found.values()))
    except ArrowException as error:
        raise ValueError(f"sparsekd.data: {path.name} is no Parquet file, or cut short ({error})") from error
    if not table.num_rows:
        raise ValueError(f"sparsekd.data: {path.name} has no rows; fetch the file again")
    texts = {what: _texts(path.name, title, table.column(title)) for what, title in found.items()}
    return _columns(path.name, *(texts.get(what, ()) for what in COLUMNS))


def _texts(name: str, title: str, column: Any) -> list[str]:
    """A column of Parquet: moments in seconds since 1970, without a zone in UTC; 3.0, as pandas has whole numbers of a
    column with gaps, as 3."""
    import pyarrow

    kind = column.type
    moments = pyarrow.types.is_timestamp(kind)
    if pyarrow.types.is_nested(kind):
        raise ValueError(f"sparsekd.data: {name}: {title} must hold one value a row, got {kind}; write a row for each")
    if moments:  # as whole microseconds: Python's own have no nanoseconds
        column = column.cast(pyarrow.timestamp("us", kind.tz), safe=False).cast(pyarrow.int64())
    try:
        values: list[Any] = [value.decode() if isinstance(value, bytes) else value for value in column.to_pylist()]
    except (ValueError, OverflowError) as error:
        raise ValueError(
            f"sparsekd.data: {name}: {title} must hold UTF-8 text, numbers or dates, got {kind} ({error}); write it "
            "as one of these"
        ) from error
    empty = next((row for row, value in enumerate(values, 1) if value is None or value != value), None)
    if empty is not None:  # None or NaN, which does not equal itself
        raise ValueError(f"sparsekd.data: {name} row {empty}: {title} is empty; fill it or leave it out")
    if moments:
        values = [value / 1e6 for value in values]
    return [str(int(value) if isinstance(value, float) and value.is_integer() else value) for value in values]


def _found(name: str, headings: Sequence[str], columns: Mapping[str, str]) -> dict[str, str]:
    """Which heading is which column.  ValueError where one that was named, or that is needed, is not there."""
    found = {}
    for what, usual in COLUMNS.items():
        wanted = (columns[what],) if what in columns else usual
        title = _heading(headings, wanted, (str, str.strip) if what in columns else (str, str.strip, _small))
        if title is not None:
            found[what] = title
        elif what in columns or what in _NEEDED:
            raise ValueError(
                f"sparsekd.data: {name} lacks a column of the {what} ({', '.join(wanted)}); its header has "
                f"{', '.join(headings)}; name it by columns={{{what!r}: ...}}, in sparsekd run by "
                f"--{what}"
            )
    return found


def _heading(headings: Sequence[str], wanted: Sequence[str], ways: Sequence[Callable[[str], str]]) -> str | None:
    """The heading that is one of `wanted`, by the first of the `ways` to write both in which one is."""
    for way in ways:
        written = {way(heading): heading for heading in reversed(headings)}
        for title in wanted:
            if way(title) in written:
                return written[way(title)]
    return None


def _small(title: str) -> str:
    return title.strip().casefold()


def _fields(name: str, data: bytes, delimiter: str | None, count: int) -> list[list[str]]:
    """`count` fields of every line; None: apart by blanks."""
    rows = [line.split(delimiter) for line in sources.text(name, data).splitlines()]
    for number, row in enumerate(rows, 1):
        if len(row) != count:
            raise ValueError(
                f"sparsekd.data: {name} line {number}: expected {count} fields, got {len(row)}; fetch the file again"
            )
    return rows


def _columns(
    name: str,
    users: Sequence[str],
    items: Sequence[str],
    ratings: Sequence[str] = (),
    times: Sequence[str] = (),
) -> Interactions:
    """From columns of text; () where there is none."""
    numbers = _floats(name, "rating", ratings) if len(ratings) else None
    seconds = _seconds(name, times) if len(times) else None
    return Interactions(_ids(name, "user", users), _ids(name, "item", items), numbers, seconds)


def _ids(name: str, column: str, texts: Sequence[str]) -> np.ndarray:
    """Int64 where all are whole numbers, else text: an id is what the file has."""
    blank = next((row for row, text in enumerate(texts, 1) if not text.strip()), None)
    if blank is not None:
        raise ValueError(f"sparsekd.data: {name} row {blank}: the {column} is empty; fill it or leave the row out")
    try:
        numbers = np.array([int(text) for text in texts], dtype=np.int64)
    except (ValueError, OverflowError):
        return np.array(list(texts), dtype=str)
    as_written = all(str(number) == text for number, text in zip(numbers.tolist(), texts, strict=True))
    return numbers if as_written else np.array(list(texts), dtype=str)  # 007 is not 7


def _floats(name: str, column: str, texts: Sequence[str]) -> np.ndarray:
    return np.array([sources.number(name, column, row, text) for row, text in enumerate(texts, 1)], np.float64)


def _seconds(name: str, texts: Sequence[str]) -> np.ndarray:
    """Numbers as they are; where the first is a date as 2020-10-15 14:55:23, all in seconds since 1970, without a zone
    in UTC."""
    try:
        float(texts[0])
    except ValueError:
        return np.array([_date(name, row, text) for row, text in enumerate(texts, 1)], np.float64)
    return _floats(name, "time", texts)


def _date(name: str, row: int, text: str) -> float:
    try:
        date = datetime.fromisoformat(re.sub("[Zz]$", "+00:00", text.strip()))
    except ValueError as error:
        raise ValueError(
            f"sparsekd.data: {name} row {row}: time must be a date as 2020-10-15 14:55:23, or in all rows a number, "
            f"got {text!r}; correct the file"
        ) from error
    return (date if date.tzinfo else date.replace(tzinfo=timezone.utc)).timestamp()


def _likes(parts: Mapping[str, Interactions]) -> float | None:
    """By the largest rating there is, four of five stars and seven of ten are liked, and of 0 and 1, or -1 and 1, the
    ones.  None for any other numbers, such as counts of plays, and where all are alike 1."""
    known = [log.ratings for log in parts.values() if log.ratings is not None]
    if len(known) < len(parts):
        return None
    ratings = np.concatenate(known)
    most = ratings.max()
    if most == 1:
        return 1.0 if ratings.min() < 1 and np.isin(ratings, (-1, 0, 1)).all() else None
    return 7.0 if 5 < most <= 10 else 4.0 if 1 < most <= 5 else None
