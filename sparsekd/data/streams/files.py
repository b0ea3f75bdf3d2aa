"""The files of a stream, piece by piece: CSV and Parquet, one after the other, or what comes into a directory."""

from __future__ import annotations

import csv
import gzip
import io
import lzma
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .columns import Column

PIECE = 8_192  # rows that are read at once
ENDINGS = (".csv", ".tsv", ".csv.gz", ".csv.xz", ".parquet")
_POLL = 0.2  # seconds between two looks at a directory

Table = dict[str, Column]


def pieces(path: Path, skip: int = 0) -> Iterator[tuple[int, Table]]:
    """(number of the first row, from 1; columns by name) of at most PIECE rows at a time, but for the first `skip`.

    Raises FileNotFoundError, ValueError for a file that is damaged, cut short or still being written, that has two
    columns of one name, or that has fewer rows than `skip`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"sparsekd.data.EventStream: {path} does not exist; give files that do")
    read = _parquet if path.suffix == ".parquet" else _csv
    yield from read(path, skip)


def _csv(path: Path, skip: int) -> Iterator[tuple[int, Table]]:
    try:
        with _opened(path) as file:
            header_line = file.readline()
            delimiter = max(",;\t", key=header_line.count)
            header = next(csv.reader([header_line], delimiter=delimiter), [])
            if not header:
                raise ValueError(
                    f"sparsekd.data.EventStream: {path} has no header line; it is empty, or still being written"
                )
            _check_names(path, header)
            reader = csv.reader(file, delimiter=delimiter)
            first, rows = 1, list[list[str]]()
            for row in reader:
                if not row:
                    continue
                if skip:
                    skip, first = skip - 1, first + 1
                    continue
                if len(row) != len(header):
                    raise ValueError(_wrong_row(path, reader.line_num + 1, len(header), len(row), not next(reader, [])))
                rows.append(row)
                if len(rows) == PIECE:
                    yield first, dict(zip(header, zip(*rows, strict=True), strict=True))
                    first, rows = first + len(rows), []
            if rows:
                yield first, dict(zip(header, zip(*rows, strict=True), strict=True))
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(
            f"sparsekd.data.EventStream: {path} cannot be read to its end ({error}); it is damaged, or still "
            "being written"
        ) from error
    _check_long_enough(path, first - 1, skip)


def _check_names(path: Path, header: Sequence[str]) -> None:
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise ValueError(
            f"sparsekd.data.EventStream: {path} has several columns of the name {', '.join(map(repr, twice))}, of "
            "which only one could be read; give every column a name of its own"
        )


def _check_long_enough(path: Path, rows: int, lacking: int) -> None:
    """`lacking`: rows that have been read before, and are not there any more."""
    if lacking:
        raise ValueError(
            f"sparsekd.data.EventStream: {path} has {rows} rows, and the stream has been read up to row "
            f"{rows + lacking} of it; put back what it had, or begin anew"
        )


def _wrong_row(path: Path, line: int, expected: int, got: int, is_last: bool) -> str:
    why = "it is cut short, or still being written: wait for its end" if is_last else "its quoting is broken"
    return f"sparsekd.data.EventStream: {path} line {line}: expected {expected} fields, got {got}; {why}"


def _opened(path: Path) -> io.TextIOBase:
    opened: Any = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    return opened(path, "rt", encoding="utf-8-sig", newline="")


def _parquet(path: Path, skip: int) -> Iterator[tuple[int, Table]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise RuntimeError(
            f"sparsekd.data.EventStream: {path} is Parquet, which needs pyarrow: pip install 'sparsekd[stream]'"
        ) from None
    try:
        with parquet.ParquetFile(path) as file:
            first = 1
            _check_names(path, file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=PIECE):
                count = batch.num_rows
                if skip >= count:
                    skip, first = skip - count, first + count
                    continue
                batch, first, skip = batch.slice(skip), first + skip, 0
                yield first, {name: _array(batch.column(name)) for name in batch.schema.names}
                first += batch.num_rows
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the system, which names the file; a damaged page is one without a number
        raise ValueError(
            f"sparsekd.data.EventStream: {path} is no whole Parquet file ({error}); it is damaged, or still "
            "being written"
        ) from error
    _check_long_enough(path, first - 1, skip)


def _array(column: Any) -> Column:
    """Numbers and times as numpy has them (missing ones NaN), everything else as texts."""
    from pyarrow import types

    if types.is_integer(column.type) and not column.null_count:
        return column.to_numpy(zero_copy_only=False)
    if types.is_floating(column.type) or types.is_timestamp(column.type) or types.is_boolean(column.type):
        values = column.to_numpy(zero_copy_only=False)
        return values.astype(np.float64) if values.dtype == object else values
    return ["" if value is None else str(value) for value in column.to_pylist()]


class Files:
    """The files of a stream in their order, as `(name, path)`: those given, or those of directories by name.

    follow  seconds to wait in the last directory for a further file, once all others are read; 0 does not wait. A file
            there that is still being written is waited for, too: until it ends with a line, or as Parquet files do.
    """

    def __init__(self, paths: Sequence[str | Path], follow: float = 0.0) -> None:
        self.paths = [Path(path) for path in paths]
        self.follow = follow
        if not self.paths:
            raise ValueError("sparsekd.data.EventStream: expected at least one file or directory, got none")
        for path in self.paths:
            if not path.exists():
                raise FileNotFoundError(f"sparsekd.data.EventStream: {path} does not exist; give files that do")
        if not follow >= 0:
            raise ValueError(f"sparsekd.data.EventStream: follow must be seconds, 0 or more, got {follow}")
        if follow and not self.paths[-1].is_dir():
            raise ValueError(
                f"sparsekd.data.EventStream: follow waits for new files in a directory, got {self.paths[-1]}; "
                "give the directory last"
            )

    def after(self, name: str | None) -> Iterator[tuple[str, Path]]:
        """From the file `name` on (None: the first), that one included; new ones as they come."""
        place = 0
        if name is not None:
            found = [path for path in self._listed() if str(path) == name]
            if not found:
                raise ValueError(
                    f"sparsekd.data.EventStream: the stream has been read up to {name}, which is not there any more; "
                    "put it back, or begin anew"
                )
            place = self._listed().index(found[0])
        last: str | None = None
        while listed := self._waits(partial(self._listed_beyond, place)):
            if last is not None:
                _check_last(listed, last, place - 1)
            path = listed[place]
            if self.follow and path.parent == self.paths[-1]:
                self._waits(partial(is_complete, path))
            yield str(path), path
            last, place = str(path), place + 1

    def _listed_beyond(self, place: int) -> list[Path]:
        """All files, if there is one at this place; else none."""
        listed = self._listed()
        return listed if len(listed) > place else []

    def _listed(self) -> list[Path]:
        files: list[Path] = []
        for path in self.paths:
            inside = sorted(path.iterdir()) if path.is_dir() else [path]
            if path.is_dir():  # hidden files and those without a known ending are others' business: *.part, _SUCCESS
                inside = [p for p in inside if p.name.endswith(ENDINGS) and not p.name.startswith((".", "_"))]
            files += inside
        return files

    def _waits(self, ask: Callable[[], Any]) -> Any:
        """The answer, as soon as it is true; what it is when `follow` seconds are over."""
        end = time.monotonic() + self.follow
        while not (answer := ask()) and time.monotonic() < end:
            time.sleep(min(_POLL, self.follow))
        return answer


def _check_last(listed: list[Path], last: str, place: int) -> None:
    """Raise ValueError where the file that was read last is not at its place any more."""
    if place >= len(listed) or str(listed[place]) != last:
        raise ValueError(
            f"sparsekd.data.EventStream: the files before {last} have changed while the stream was read; a file that "
            "comes must sort after those that are there, and none may go"
        )


def is_complete(path: Path) -> bool:
    """Whether a file ends as its kind does: Parquet with its mark, text with the end of a line. Others are taken so."""
    if path.suffix in (".gz", ".xz"):
        return True
    size = path.stat().st_size
    ending = b"PAR1" if path.suffix == ".parquet" else b"\n"
    if size < len(ending):
        return False
    with path.open("rb") as file:
        file.seek(size - len(ending))
        return file.read() == ending
