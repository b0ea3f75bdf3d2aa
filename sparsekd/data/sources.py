"""Find, open and check source files. Every failure says which file, what was expected and what to do."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import lzma
import math
import os
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

_UNPACK = {".xz": lzma.decompress, ".gz": gzip.decompress}
_CORRUPT = (lzma.LZMAError, gzip.BadGzipFile, zlib.error, zipfile.BadZipFile, EOFError)


def root_of(task: str, data_dir: str | os.PathLike[str] | None, embedded: bool = False) -> Path | None:
    """The place the user named: `data_dir`, $SPARSEKD_DATA_<TASK>, (not embedded) $SPARSEKD_DATA; None without any."""
    variables = (f"SPARSEKD_DATA_{task.upper()}",) if embedded else (f"SPARSEKD_DATA_{task.upper()}", "SPARSEKD_DATA")
    place = data_dir or next(filter(None, map(os.environ.get, variables)), None)
    if place is None:
        return None
    path = Path(place)
    if not path.exists():
        raise FileNotFoundError(
            f"sparsekd.data.load({task!r}): the data folder {str(path)!r} does not exist; "
            f"pass an existing one as data_dir (--data DIR) or in {variables[0]}"
        )
    return path


def find(task: str, root: Path | None, folder: str, names: Sequence[str]) -> Path:
    """First of `names` that exists in `root` or in `root/folder` (or `root` itself, where it is such a file).

    Raises FileNotFoundError naming every path that was tried.
    """
    if root is None:
        raise FileNotFoundError(
            f"sparsekd.data.load({task!r}): this data does not ship with sparsekd and no data_dir was given; pass the "
            f"folder that holds {folder}/{names[0]} as data_dir (--data DIR) or in SPARSEKD_DATA_{task.upper()}"
        )
    if root.is_file():
        if root.name in names:
            return root
        raise FileNotFoundError(
            f"sparsekd.data.load({task!r}): expected {' or '.join(names)}, got the file {str(root)!r}"
        )
    tried = [place / name for name in names for place in (root, root / folder)]
    for path in tried:
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"sparsekd.data.load({task!r}): found none of {', '.join(str(p) for p in tried)}; "
        f"put {' or '.join(names)} into one of these folders, or pass another data_dir"
    )


def unpack(name: str, data: bytes) -> bytes:
    """Decompress `data` as the suffix of `name` says (.xz, .gz, or plain).  ValueError where it is corrupt or empty."""
    try:
        data = _UNPACK.get(Path(name).suffix, bytes)(data)
    except _CORRUPT as error:
        raise ValueError(f"sparsekd.data: {name} is corrupt or cut short ({error}); fetch the file again") from error
    if not data.strip():
        raise ValueError(f"sparsekd.data: {name} is empty; fetch the file again")
    return data


def unzip(name: str, data: bytes, members: Sequence[str]) -> dict[str, bytes]:
    """The named members of a zip archive, found by file name in any folder of it; absent ones are left out."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            inside = {Path(entry).name: entry for entry in archive.namelist()}
            return {member: archive.read(inside[member]) for member in members if member in inside}
    except _CORRUPT as error:
        raise ValueError(f"sparsekd.data: {name} is corrupt or cut short ({error}); fetch the file again") from error


def text(name: str, data: bytes) -> str:
    """Decode UTF-8; ValueError names the file and the line where it is something else."""
    bad = data.find(b"\0")  # English in UTF-16 is UTF-8 with zeros
    try:
        content = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        bad = error.start if bad < 0 else min(bad, error.start)
    if bad >= 0:
        line = data.count(b"\n", 0, bad) + 1
        raise ValueError(
            f"sparsekd.data: {name} is not UTF-8 (line {line}); save it as UTF-8, or, where it is cut short, fetch it "
            "again"
        )
    return content


def table(
    name: str, data: bytes, columns: Sequence[str], delimiters: str = ",", padded: bool = False
) -> dict[str, list[str]]:
    """The named columns of a CSV file with a header line, as lists of strings.

    The delimiter is the one of `delimiters` that splits the header line into most fields; `padded` fields lose the
    blanks around them. ValueError names missing columns, or the first line with the wrong number of fields, or says
    that there are no rows.
    """
    content = text(name, data)
    delimiter = max(delimiters, key=content.split("\n", 1)[0].count)
    reader = csv.reader(io.StringIO(content, newline=""), delimiter=delimiter, skipinitialspace=padded)
    header = next(reader)
    missing = [column for column in columns if column not in header]
    if missing:
        raise ValueError(
            f"sparsekd.data: {name} lacks the column(s) {', '.join(missing)}; its header has {', '.join(header)}"
        )
    rows: list[list[str]] = []
    for row in reader:
        if len(row) == len(header):
            rows.append([field.strip() for field in row] if padded else row)
        elif row:
            raise ValueError(
                f"sparsekd.data: {name} line {reader.line_num}: expected {len(header)} fields, got {len(row)}; "
                "the file is cut short or its quoting is broken"
            )
    if not rows:
        raise ValueError(f"sparsekd.data: {name} has a header but no rows; fetch the file again")
    return {column: [row[header.index(column)] for row in rows] for column in columns}


def number(name: str, column: str, row: int | str, value: str, blank: float | None = None) -> float:
    """`value` of a row (number or title) as a finite float; `blank`, if given, for an empty field; else ValueError."""
    if blank is not None and not value.strip():
        return blank
    try:
        result = float(value)
    except ValueError:
        result = math.nan
    if not math.isfinite(result):
        raise ValueError(
            f"sparsekd.data: {name} row {row}: {column} must be a finite number, got {value!r}; correct the file"
        )
    return result


def integer(name: str, column: str, row: int | str, value: str, whole: bool = True) -> int:
    """`value` of a row as an integer of 64 bits, exact where it is written as one; else ValueError.

    Without `whole` a fraction is cut off, as of time stamps.
    """
    try:
        result = int(value)
    except ValueError:
        as_float = number(name, column, row, value)
        result = int(as_float)
        if abs(as_float) >= 2**53 or (whole and result != as_float):
            raise ValueError(
                f"sparsekd.data: {name} row {row}: {column} must be a whole number, got {value!r}; correct the file"
            ) from None
    if not -(2**63) <= result < 2**63:
        raise ValueError(
            f"sparsekd.data: {name} row {row}: {column} must fit 64 bits, got {value!r}; number the rows anew"
        )
    return result


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
