"""What a loop trains and judges on: parts of a data set that hand out batches, whatever they are made of.

    Rows    inputs and a target for each row, in any order.
    Pairs   a user and an item each, with sampled items that the user has not chosen.
    Period  rows of one window of a stream, always in order; `periods` cuts a stream into them.

Names in this file: N rows, B rows of a batch, U users, I items, K negatives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from .. import pairs

__all__ = ["Augmentation", "Batch", "Pairs", "Part", "Period", "Rows", "histories", "periods"]

Batch = tuple[tuple[Tensor, ...], Tensor]  # (inputs of the network, target of the goal)
Prepare = Callable[[tuple[Tensor, ...], torch.Generator | None], tuple[Tensor, ...]]
P = TypeVar("P", bound="Part")


@runtime_checkable
class Augmentation(Protocol):
    """What prepares rows and can say beforehand what it does to each of them: then every row has fixed views."""

    def __call__(self, inputs: tuple[Tensor, ...], generator: torch.Generator | None = None) -> tuple[Tensor, ...]: ...

    def draw(self, rows: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """What happens to so many rows, by chance: tensors of first axis ``rows``."""

    def apply(self, inputs: tuple[Tensor, ...], drawn: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The rows, prepared as they were drawn."""


class Part(Protocol):
    """Train, val or test of a task, or a piece of a stream."""

    def __len__(self) -> int:
        """Rows, of whatever kind."""

    def steps(self, batch_size: int) -> int:
        """Batches of an epoch. A last batch that is too small to train on (see `batches`) counts as one."""

    def batches(
        self, batch_size: int, generator: torch.Generator | None = None, rank: int = 0, ranks: int = 1
    ) -> Iterator[Batch]:
        """Yield (inputs, target) of at most `batch_size` rows: to train with a generator, all in order without one.

        Training leaves out a last batch of one row, on which batch normalisation cannot be trained. Of several `ranks`,
        each gets its share of every batch.
        """

    def examples(self, rows: int = 2) -> tuple[Tensor, ...]:
        """What a network gets for the first `rows` rows, over again where there are fewer: for tracing and timing."""

    def to(self: P, device: torch.device | str) -> P:
        """The same part with its tensors on `device`."""


@dataclass(frozen=True)
class Rows:
    """N rows of one part (train, val or test).

    inputs    tuple of tensors, first axis N: what the network is called with, once `prepare` has seen it.
    target    float32 [N], or int64 [N] where it is a class.
    features  float32 [N, F]: the same information as one table, for the baselines; None where there are none.
    users, items  int64 [N], 0 = not seen in train; None where the task has no users.
    weight    float32 [N] or None: how often a row is drawn in training, relative to the others (None: equally).
    prepare   makes the inputs of a batch from its rows, e.g. images from bytes; with a generator it augments them.
    """

    inputs: tuple[Tensor, ...]
    target: Tensor
    features: np.ndarray | None
    users: np.ndarray | None = None
    items: np.ndarray | None = None
    weight: np.ndarray | None = None
    prepare: Prepare | None = None

    def __len__(self) -> int:
        return len(self.target)

    def take(self, rows: slice | np.ndarray) -> Rows:
        """The rows of a slice, an index array or a mask."""
        pick = torch.from_numpy(np.arange(len(self))[rows])
        return replace(
            self,
            inputs=tuple(x[pick] for x in self.inputs),
            target=self.target[pick],
            features=None if self.features is None else self.features[rows],
            users=None if self.users is None else self.users[rows],
            items=None if self.items is None else self.items[rows],
            weight=None if self.weight is None else self.weight[rows],
        )

    def to(self, device: torch.device | str) -> Rows:
        """The same rows with inputs and target on `device`."""
        return replace(self, inputs=tuple(x.to(device) for x in self.inputs), target=self.target.to(device))

    def in_view(self, generator: torch.Generator) -> Rows:
        """The same rows, each augmented in one way that is drawn now, whenever it is seen. ValueError without an
        `Augmentation`."""
        if not isinstance(self.prepare, Augmentation):
            raise ValueError(f"sparsekd.data.Rows.in_view: expected rows with an Augmentation, got {self.prepare!r}")
        drawn = tuple(x.to(self.target.device) for x in self.prepare.draw(len(self), generator))
        return replace(self, inputs=(*self.inputs, *drawn), prepare=_AsDrawn(self.prepare, len(drawn)))

    def steps(self, batch_size: int) -> int:
        return math.ceil(len(self) / batch_size)

    def batches(
        self, batch_size: int, generator: torch.Generator | None = None, rank: int = 0, ranks: int = 1
    ) -> Iterator[Batch]:
        """As `Part.batches`. An epoch is a random order of the rows; with weights it is as many rows, drawn with
        replacement."""
        yield from self.in_order(self._epoch(generator), batch_size, generator, rank, ranks)

    def in_order(
        self, order: Tensor, batch_size: int, generator: torch.Generator | None = None, rank: int = 0, ranks: int = 1
    ) -> Iterator[Batch]:
        """The batches of the rows `order` [N], one after the other; a generator augments them."""
        for _, batch in self._numbered(order, batch_size, generator, rank, ranks):
            yield batch

    def numbered(
        self, batch_size: int, generator: torch.Generator | None = None, rank: int = 0, ranks: int = 1
    ) -> Iterator[tuple[Tensor, Batch]]:
        """The same as `batches`, each with the numbers of its rows, int64 [B]."""
        yield from self._numbered(self._epoch(generator), batch_size, generator, rank, ranks)

    def _numbered(
        self, order: Tensor, batch_size: int, generator: torch.Generator | None, rank: int, ranks: int
    ) -> Iterator[tuple[Tensor, Batch]]:
        if generator is not None and rank:  # other crops than rank 0 has, in the same order of rows
            generator = torch.Generator().manual_seed(generator.initial_seed() + 7_919 * rank)
        for rows in _training_batches(order, batch_size, generator, ranks):
            mine = rows[rank::ranks]
            inputs, target = self._rows(mine)
            yield mine, (self.prepared(inputs, generator), target)

    def prepared(self, inputs: tuple[Tensor, ...], generator: torch.Generator | None = None) -> tuple[Tensor, ...]:
        return inputs if self.prepare is None else self.prepare(inputs, generator)

    def examples(self, rows: int = 2) -> tuple[Tensor, ...]:
        """What a network gets for the first `rows` rows, over again where there are fewer: for tracing and timing."""
        return self.prepared(self._rows(torch.arange(rows) % len(self))[0])

    def _rows(self, rows: Tensor) -> Batch:
        rows = rows.to(self.target.device)
        return tuple(x[rows] for x in self.inputs), self.target[rows]

    def _epoch(self, generator: torch.Generator | None) -> Tensor:
        if generator is None:
            return torch.arange(len(self))
        if self.weight is None:
            return torch.randperm(len(self), generator=generator)
        return torch.from_numpy(self.weight).multinomial(len(self), replacement=True, generator=generator)


@dataclass(frozen=True)
class _AsDrawn:
    """Prepares rows whose last ``count`` inputs are what was drawn for them."""

    augmentation: Augmentation
    count: int

    def __call__(self, inputs: tuple[Tensor, ...], generator: torch.Generator | None = None) -> tuple[Tensor, ...]:
        first = len(inputs) - self.count
        return self.augmentation.apply(inputs[:first], inputs[first:])


@dataclass(frozen=True)
class Pairs:
    """N pairs of a user and an item that the user chose, for `goals.Ranking`.

    Batches are ((users [B], items [B], negatives [B, K]), an empty target [B, 0]). Negatives are drawn evenly from the
    items that the user has not seen: never an item of the history. Without a generator they are the same in every call.

    users, items              int64 [N]; other integers become so.
    num_items                 I; items count from 0.
    seen_offsets, seen_items  the train history of every user, in CSR form: user u has seen
                              seen_items[seen_offsets[u] : seen_offsets[u + 1]], each item once, in rising order. int64
                              [U + 1] and [number of entries]; `histories` makes them.
    negatives                 K, negatives of each pair.
    user_ids, item_ids        what the source calls user 0, 1, ... and item 0, 1, ...; None where it is not known.

    Raises ValueError for numbers out of range, histories out of order and users who have seen everything.
    """

    users: Tensor
    items: Tensor
    num_items: int
    seen_offsets: Tensor
    seen_items: Tensor
    negatives: int = 1
    user_ids: np.ndarray | None = None
    item_ids: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.negatives < 1:
            raise ValueError(f"sparsekd.data.Pairs: negatives must be at least 1, got {self.negatives}")
        num_users = len(self.seen_offsets) - 1
        users, items = pairs.checked("data.Pairs", self.users, self.items, num_users, self.num_items)
        pairs.check_numbers("data.Pairs", "seen_items", self.seen_items, self.num_items)
        as_int64 = {"users": users, "items": items, "seen_offsets": self.seen_offsets.long()}
        for name, values in (as_int64 | {"seen_items": self.seen_items.long()}).items():
            object.__setattr__(self, name, values)  # of a frozen dataclass
        self._check_histories()

    def _check_histories(self) -> None:
        offsets, seen = self.seen_offsets.cpu(), self.seen_items.cpu()
        counts = offsets.diff()
        if len(offsets) < 1 or offsets[0] != 0 or offsets[-1] != len(seen) or (counts < 0).any():
            raise ValueError(
                f"sparsekd.data.Pairs: seen_offsets must rise from 0 to {len(seen)}, the number of seen_items; "
                "make both with data.histories"
            )
        owner = torch.arange(len(counts)).repeat_interleave(counts)
        if not ((owner.diff() > 0) | (seen.diff() > 0)).all():
            raise ValueError(
                "sparsekd.data.Pairs: the seen_items of a user must rise, each once; make them with data.histories"
            )
        users = self.users.cpu()
        full = users[counts[users] >= self.num_items]
        if len(full):
            raise ValueError(
                f"sparsekd.data.Pairs: user {int(full[0])} has seen all {self.num_items} items, so that no negative "
                "can be drawn; leave this user out"
            )

    def __len__(self) -> int:
        return len(self.users)

    def to(self, device: torch.device | str) -> Pairs:
        names = ("users", "items", "seen_offsets", "seen_items")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    def steps(self, batch_size: int) -> int:
        return math.ceil(len(self) / batch_size)

    def batches(
        self, batch_size: int, generator: torch.Generator | None = None, rank: int = 0, ranks: int = 1
    ) -> Iterator[Batch]:
        """As `Part.batches`. The negatives of a batch are what one rank alone would draw, shared like its rows."""
        if generator is None:
            order, drawing = torch.arange(len(self)), torch.Generator().manual_seed(0)
        else:
            order, drawing = torch.randperm(len(self), generator=generator), generator
        for rows in _training_batches(order, batch_size, generator, ranks):
            rows = rows.to(self.users.device)
            negatives = self._drawn(self.users[rows], drawing)
            mine = rows[rank::ranks]
            inputs = self.users[mine], self.items[mine], negatives[rank::ranks]
            yield inputs, torch.empty(len(mine), 0, device=mine.device)

    def examples(self, rows: int = 2) -> tuple[Tensor, ...]:
        pick = (torch.arange(rows) % len(self)).to(self.users.device)
        users = self.users[pick]
        return users, self.items[pick], self._drawn(users, torch.Generator().manual_seed(0))

    def _drawn(self, users: Tensor, generator: torch.Generator) -> Tensor:
        """Items [B, K] that these users have not seen, each as likely as the others.

        A user with n items in the history has I - n others; what is drawn is which of these, counted from 0. Before the
        r-th of them come all history items s_j (j from 0, rising) with s_j - j <= r, so that it is item r + that many.
        """
        unseen = self.num_items - self.seen_offsets.diff()[users]  # [B]
        share = torch.rand(len(users), self.negatives, generator=generator, dtype=torch.float64).to(users.device)
        # The clamp is for a share so close to 1 that the product rounds up.
        place = (share * unseen[:, None]).long().minimum(unseen[:, None] - 1)
        skipped = torch.searchsorted(self._gaps, users[:, None] * (self.num_items + 1) + place, right=True)
        return place + skipped - self.seen_offsets[users][:, None]

    @cached_property
    def _gaps(self) -> Tensor:
        """s_j - j of every history, one rising vector for all users: that of user u is moved up by u * (I + 1)."""
        counts = self.seen_offsets.diff()
        owner = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
        within = torch.arange(len(owner), device=counts.device) - self.seen_offsets[owner]
        return owner * (self.num_items + 1) + self.seen_items - within


def histories(users: Tensor, items: Tensor, num_users: int, num_items: int) -> tuple[Tensor, Tensor]:
    """What each of `num_users` users has seen, by the pairs users [N] and items [N]: the two fields of `Pairs`.

    >>> histories(torch.tensor([2, 0, 2, 2]), torch.tensor([5, 1, 3, 5]), num_users=3, num_items=6)
    (tensor([0, 1, 1, 3]), tensor([1, 3, 5]))
    """
    users, items = pairs.once(*pairs.checked("data.histories", users, items, num_users, num_items), num_items)
    counts = torch.bincount(users, minlength=num_users)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]), items


@dataclass(frozen=True)
class Period:
    """The rows of one window of a stream, start <= time < end, in the order in which they came.

    Batches are in that order also in training: a generator only augments them.
    """

    rows: Rows
    start: float
    end: float

    def __len__(self) -> int:
        return len(self.rows)

    def to(self, device: torch.device | str) -> Period:
        return replace(self, rows=self.rows.to(device))

    def steps(self, batch_size: int) -> int:
        return self.rows.steps(batch_size)

    def batches(
        self, batch_size: int, generator: torch.Generator | None = None, rank: int = 0, ranks: int = 1
    ) -> Iterator[Batch]:
        yield from self.rows.in_order(torch.arange(len(self)), batch_size, generator, rank, ranks)

    def examples(self, rows: int = 2) -> tuple[Tensor, ...]:
        return self.rows.examples(rows)


def periods(rows: Rows, times: np.ndarray, edges: Sequence[float]) -> list[Period]:
    """Cut a stream into windows: rows in the order of time, times [N], edges [E + 1] of E windows that touch.

    Raises ValueError for times or edges out of order, rows beyond the edges, windows without a row and weighted rows.
    """
    times = np.asarray(times)
    if times.shape != (len(rows),):
        raise ValueError(f"sparsekd.data.periods: expected {len(rows)} times, one a row, got {times.shape}")
    backwards = np.flatnonzero(~(np.diff(times) >= 0))
    if len(backwards):
        row = int(backwards[0]) + 1
        raise ValueError(
            f"sparsekd.data.periods: times must not fall, got {times[row]:g} after {times[row - 1]:g} in row {row}; "
            "sort the rows by time first: rows.take(np.argsort(times, kind='stable'))"
        )
    if len(edges) < 2 or not (np.diff(edges) > 0).all():
        raise ValueError(f"sparsekd.data.periods: edges must be two or more rising times, got {list(edges)}")
    if len(times) and not edges[0] <= times[0] <= times[-1] < edges[-1]:
        raise ValueError(
            f"sparsekd.data.periods: the edges {edges[0]:g}..{edges[-1]:g} must hold all times, got "
            f"{times[0]:g}..{times[-1]:g} (the last edge lies beyond its window); take fewer rows or move the edges"
        )
    if rows.weight is not None:
        raise ValueError("sparsekd.data.periods: rows with weights are drawn at random, and a period keeps its order")
    places = np.searchsorted(times, edges, side="left")
    windows = []
    for (start, begin), (end, stop) in pairwise(zip(edges, places, strict=True)):
        if begin == stop:
            raise ValueError(
                f"sparsekd.data.periods: no row lies in {start:g}..{end:g}; join this window to one beside it"
            )
        windows.append(Period(rows.take(slice(int(begin), int(stop))), float(start), float(end)))
    return windows


def _training_batches(
    order: Tensor, batch_size: int, generator: torch.Generator | None, ranks: int
) -> Iterator[Tensor]:
    """Rows of each batch, for all ranks together. In training every rank needs two rows for its batch norm."""
    for rows in order.split(batch_size):
        if generator is None or len(rows) > 2 * ranks - 1:
            yield rows
