"""Events into windows of so many seconds, or so many rows; rows without a click are drawn where none are given.

Names in this file: N rows, F numeric features, C columns of ids.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from ..parts import Period, Rows
from .columns import Columns, Events
from .files import PIECE, Files, pieces

RECENT = 4_096  # clicks whose items are drawn for rows without one
_TRIES = 4  # draws of an item that its user has not clicked just now


class ClickStream(Protocol):
    """Windows in the order of time, the next of them at every step, from where a state says."""

    def __iter__(self) -> Iterator[Period]: ...

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is: after the window that came last."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the window that came last when the state was taken."""

    @property
    def sizes(self) -> dict[str, int]:
        """What a network must know: `numeric` and `ids`, the columns of its two inputs."""

    def describe(self) -> dict[str, Any]:
        """JSON values that say which stream it is."""


class EventStream:
    """Events of CSV and Parquet files as windows, read piece by piece.

    Args:
        paths: files in their order, and directories, whose files come by name (.csv, .tsv, .csv.gz, .csv.xz, .parquet).
        columns: which of them are what.
        window: seconds of a window, or with `rows` its events; those of one moment stay together.
        negatives: rows without a click that are drawn for each click, where there is no label: an item of one of the
            latest 4 096 clicks that came strictly earlier, as often as they have it, but none of those that the
            user has clicked up to then. Everything else is that of the click.
        follow: seconds to wait for further files in the last directory.
        seed: of the draws.

    Windows without an event are left out. Rows at the end that are fewer than two are kept for the next call. What is
    added later at the very time at which the last window ended comes in the next one.

    Raises ValueError, with the file and the row, for rows out of order, for numbers that are none, for labels other
    than 0 and 1, for columns that a file lacks, and for one that was cut behind what has been read of it.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        columns: Columns | None = None,
        *,
        window: float | None = None,
        rows: int | None = None,
        negatives: int = 1,
        follow: float = 0.0,
        seed: int = 0,
    ) -> None:
        if (window is None) == (rows is None):
            raise ValueError("sparsekd.data.EventStream: give a window in seconds or in rows, one of them")
        for name, number, least in (("window", window, 1e-6), ("rows", rows, 2), ("negatives", negatives, 1)):
            if number is not None and not least <= number < math.inf:
                raise ValueError(f"sparsekd.data.EventStream: {name} must be at least {least:g}, got {number}")
        self.files = Files(paths, follow)
        self.columns = columns or Columns()
        self.window, self.rows, self.negatives, self.seed = window, rows, negatives, seed
        self._settled: Columns | None = None
        self._header: tuple[str, ...] = ()
        self._number, self._end = 0, -math.inf  # of the window that came last
        self._file: str | None = None  # what has been given out: the first `_row` rows of it
        self._row = 0
        self._recent: Events | None = None

    @property
    def settled(self) -> Columns:
        """The columns, with the further ones named: those of the first file."""
        if self._settled is None:
            for name, path in self.files.after(None):
                for _, table in pieces(path):
                    self._settled, self._header = self.columns.settled(name, table), tuple(table)
                    return self._settled
            raise ValueError("sparsekd.data.EventStream: there is no row in any of the files")
        return self._settled

    @property
    def sizes(self) -> dict[str, int]:
        return {"numeric": max(1, len(self.settled.numeric or ())), "ids": 2 + len(self.settled.categorical or ())}

    def columns_in_words(self) -> str:
        """What every column of the first file is taken for."""
        return self.settled.in_words(self._header)

    def describe(self) -> dict[str, Any]:
        columns = self.settled
        further = {"numeric": list(columns.numeric or ()), "categorical": list(columns.categorical or ())}
        further |= {"of_item": list(columns.of_item)} if columns.of_item else {}
        missing = {} if columns.missing is None else {"missing": columns.missing}
        drawn = {"negatives": self.negatives, "seed": self.seed} if columns.label is None else {}
        return {
            "files": [path.name for path in self.files.paths],
            "window": f"{self.window:g} s" if self.rows is None else f"{self.rows} rows",
            **{name: getattr(columns, name) for name in ("user", "item", "timestamp")},
            "label": columns.label or "none",
            **({} if columns.click_at is None else {"click_at": columns.click_at}),
            **further,
            **missing,
            **drawn,
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "number": self._number,
            "end": self._end,
            "file": self._file,
            "row": self._row,
            "columns": self._meanings(),
            "recent": {}
            if self._recent is None
            else {
                "ids": torch.from_numpy(self._recent.ids),
                "numeric": torch.from_numpy(self._recent.numeric),
                "times": torch.from_numpy(self._recent.times),
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        then, now = state.get("columns"), self._meanings()
        if then != now:
            which = "an earlier version of sparsekd, which did not say what its columns mean"
            if then is not None:
                others = (f"{name} {then.get(name)}, now {now[name]}" for name in now if then.get(name) != now[name])
                which = f"a stream with other columns: {'; '.join(others)}"
            raise ValueError(
                f"sparsekd.data.EventStream: the state is of {which}; read the same columns, or begin anew"
            )
        self._number, self._end = state["number"], state["end"]
        self._file, self._row = state["file"], state["row"]
        recent = state["recent"]
        if recent:
            times = recent["times"].numpy()
            clicks = np.ones(len(times), np.float32)
            self._recent = Events(times, clicks, recent["numeric"].numpy(), recent["ids"].numpy())

    def _meanings(self) -> dict[str, Any]:
        """The columns as a state file gives them back: of lists, not tuples."""
        return dict(json.loads(json.dumps(asdict(self.settled))))

    def __iter__(self) -> Iterator[Period]:
        buffer: list[Events] = []
        origins: deque[tuple[str, int]] = deque()  # (file, rows of it that lie in the buffer)
        for name, events in self._pieces():
            buffer.append(events)
            origins.append((name, len(events)))
            if not self._may_be_whole(buffer):
                continue
            joined = Events.join(buffer)
            while (cut := self._cut(joined)) is not None:
                count, start, end = cut
                self._advance(origins, count)
                yield self._period(joined.take(slice(0, count)), start, end)
                joined = joined.take(slice(count, None))
            buffer = [joined]
            if self.rows is not None and len(joined) > 4 * self.rows + PIECE:
                raise ValueError(
                    f"sparsekd.data.EventStream: {len(joined)} events have the time {joined.times[-1]:.17g}, which a "
                    f"window of {self.rows} rows cannot part; take longer windows, or finer time stamps"
                )
        rest = Events.join(buffer) if buffer else None
        if rest is not None and len(rest) > 1:
            self._advance(origins, len(rest))
            yield self._period(rest, self._start(rest), float(np.nextafter(rest.times[-1], math.inf)))

    def _pieces(self) -> Iterator[tuple[str, Events]]:
        """What has not been given out yet, in the order of time."""
        columns = self.settled
        # The window at the end of all files closed just behind its last row: others of that moment may still come.
        latest, skip = float(np.nextafter(self._end, -math.inf)), self._row
        for name, path in self.files.after(self._file):
            for first, table in pieces(path, skip):
                columns.check_header(name, table)
                events = columns.events(name, first, table)
                before = np.concatenate([[latest], events.times[:-1]])
                wrong = np.flatnonzero(events.times < before)
                if len(wrong):
                    row = int(wrong[0])
                    raise ValueError(
                        f"sparsekd.data.EventStream: {name} row {first + row}: time must not fall, got "
                        f"{events.times[row]:.17g} after {before[row]:.17g}; sort the rows by time, and give the files "
                        "in their order"
                    )
                latest = float(events.times[-1])
                yield name, events
            skip = 0

    def _may_be_whole(self, buffer: Sequence[Events]) -> bool:
        """Whether the pieces hold a window and what comes behind it: only then it pays to join them."""
        if self.rows is not None:
            return sum(map(len, buffer)) > self.rows
        assert self.window is not None
        first = next((float(events.times[0]) for events in buffer if len(events)), math.inf)
        return float(buffer[-1].times[-1]) >= (first // self.window + 1) * self.window

    def _start(self, events: Events) -> float:
        first = float(events.times[0])
        return max(first if self.window is None else first // self.window * self.window, self._end)

    def _cut(self, events: Events) -> tuple[int, float, float] | None:
        """(rows, start, end) of the first whole window; None as long as it is not known to be whole."""
        if not len(events):
            return None
        start = self._start(events)
        if self.window is not None:
            end = (float(events.times[0]) // self.window + 1) * self.window
            count = int(np.searchsorted(events.times, end, side="left"))
            return (count, start, end) if 1 < count < len(events) else self._joined(events, count, start)
        assert self.rows is not None
        if len(events) <= self.rows:
            return None
        count = int(np.searchsorted(events.times, events.times[self.rows], side="left"))
        if count < 2:  # all of one moment so far
            count = int(np.searchsorted(events.times, events.times[self.rows], side="right"))
        return (count, start, float(events.times[count])) if count < len(events) else None

    def _joined(self, events: Events, count: int, start: float) -> tuple[int, float, float] | None:
        """A window of a single event goes with the next: nothing can be learnt from one."""
        if count != 1 or len(events) < 3:
            return None
        assert self.window is not None
        end = (float(events.times[1]) // self.window + 1) * self.window
        count = int(np.searchsorted(events.times, end, side="left"))
        return (count, start, end) if count < len(events) else None

    def _advance(self, origins: deque[tuple[str, int]], count: int) -> None:
        """Note that the first `count` rows of the buffer have been given out."""
        while count:
            name, rows = origins.popleft()
            taken = min(rows, count)
            self._file, self._row = name, (self._row if name == self._file else 0) + taken
            count -= taken
            if taken < rows:
                origins.appendleft((name, rows - taken))

    def _period(self, events: Events, start: float, end: float) -> Period:
        self._number, self._end = self._number + 1, end
        if self.settled.label is None:
            events = self._with_negatives(events)
        return period_of(events, start, end)

    def _with_negatives(self, clicks: Events) -> Events:
        """Each click, and behind it the rows that are drawn for it."""
        generator = np.random.default_rng((self.seed, self._number))
        known = clicks if self._recent is None else Events.join([self._recent, clicks])
        place = np.arange(len(known) - len(clicks), len(known))  # of the clicks
        # How many of the known ones came strictly earlier, and where the latest RECENT of these begin.
        end = np.searchsorted(known.times, clicks.times, side="left")
        begin = np.maximum(end - RECENT, 0)
        users, items, times = known.ids[:, 0].tolist(), known.ids[:, 1].tolist(), known.times.tolist()
        clicked = dict(zip(zip(reversed(users), reversed(items), strict=True), reversed(times), strict=True))
        drawn, owner = [], []
        for _ in range(self.negatives):
            source = np.full(len(clicks), -1)
            for _ in range(_TRIES):
                open_ = np.flatnonzero((source < 0) & (end > begin))
                tried = begin[open_] + (generator.random(len(open_)) * (end - begin)[open_]).astype(np.int64)
                first = [
                    clicked.get((users[own], items[other]), math.inf)
                    for own, other in zip(place[open_].tolist(), tried.tolist(), strict=True)
                ]
                fits = np.array(first, np.float64) > clicks.times[open_]
                source[open_[fits]] = tried[fits]
            hit = np.flatnonzero(source >= 0)
            drawn.append(source[hit])
            owner.append(hit)
        owners, sources = np.concatenate(owner), np.concatenate(drawn)
        rows = known.take(place[owners])
        numeric, ids = rows.numeric.copy(), rows.ids.copy()
        of_numeric, of_ids = self.settled.places_of_item()
        numeric[:, of_numeric] = known.numeric[sources][:, of_numeric]
        ids[:, of_ids] = known.ids[sources][:, of_ids]
        negatives = Events(rows.times, np.zeros(len(rows), np.float32), numeric, ids)
        order = np.argsort(np.concatenate([np.arange(len(clicks)), owners]), kind="stable")
        self._recent = known.take(slice(-RECENT, None))
        return Events.join([clicks, negatives]).take(order)


class TableStream:
    """Events that are all in memory, as windows of so many rows or seconds; what `EventStream` is for files.

    Raises ValueError where times fall.
    """

    def __init__(
        self, name: str, events: Events, *, window: float | None = None, rows: int | None = None, sha256: Any = None
    ) -> None:
        if (window is None) == (rows is None):
            raise ValueError("sparsekd.data.TableStream: give a window in seconds or in rows, one of them")
        if not (np.diff(events.times) >= 0).all():
            raise ValueError("sparsekd.data.TableStream: times must not fall; sort the rows by time")
        self.name, self.events, self.window, self.rows, self.sha256 = name, events, window, rows, sha256
        self._edges = self._cut()
        self._number = 0

    @property
    def sizes(self) -> dict[str, int]:
        return {"numeric": self.events.numeric.shape[1], "ids": self.events.ids.shape[1]}

    def __len__(self) -> int:
        return len(self._edges) - 1

    def describe(self) -> dict[str, Any]:
        window = f"{self.window:g} s" if self.rows is None else f"{self.rows} rows"
        return {"name": self.name, "window": window, "events": len(self.events), "sha256": self.sha256}

    def state_dict(self) -> dict[str, Any]:
        return {"number": self._number}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._number = state["number"]

    def __iter__(self) -> Iterator[Period]:
        while self._number < len(self):
            begin, stop = self._edges[self._number : self._number + 2]
            self._number += 1
            times = self.events.times
            end = float(times[stop]) if stop < len(times) else float(np.nextafter(times[-1], math.inf))
            yield period_of(self.events.take(slice(begin, stop)), float(times[begin]), end)

    def _cut(self) -> list[int]:
        """The first row of every window, and the number of rows. Equal times stay together; no window has one row."""
        times = self.events.times
        if self.rows is None:
            wanted = np.flatnonzero(np.diff(times // self.window)) + 1
        else:
            wanted = np.searchsorted(times, times[self.rows :: self.rows], side="left")
        edges = [0]
        for edge in wanted.tolist():
            if edge - edges[-1] > 1 and len(times) - edge > 1:
                edges.append(edge)
        return [*edges, len(times)]


def period_of(events: Events, start: float, end: float) -> Period:
    inputs = (torch.from_numpy(events.numeric), torch.from_numpy(events.ids))
    return Period(Rows(inputs, torch.from_numpy(events.clicks), None), start, end)
