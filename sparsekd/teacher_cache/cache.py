"""TeacherCache: what a teacher says and sees of every row.

Names in this file: N rows, K views, B rows of a batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import distributed
from ..features import FeatureStats, feature_stats, stats_widths
from ..modes import evaluation_mode
from ..outputs import Pick
from ..tapped import TappedNetwork, TeacherSource, TeacherTargets, check_inputs
from .file import Arrays, in_memory, mapped, num_bytes

VERSION = 2
_EXCHANGED = 1 << 24  # bytes that ranks send at once


class TeacherCache:
    """What KD, SAD and AT need of a teacher (its output, and means and energy maps of its tapped layers), once a row.

    A student's loss takes ``cache[rows]`` in place of a run of the teacher, and is the same but for rounding. That
    holds as long as the teacher sees a row as it was added: without augmentation, or with one of K fixed views of it.

    >>> teacher = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> x = torch.randn(10, 4)
    >>> cache = TeacherCache(teacher, ["1"], rows=10, example_inputs=(x[:2],))
    >>> cache
    TeacherCache(10 rows, 1 view, taps ['1'], 770 bytes in memory)
    >>> cache.add(torch.arange(10), (x,))
    >>> cache[torch.tensor([3, 1])].output.shape
    torch.Size([2, 3])

    Args:
        teacher: the network; it is run in eval mode, without gradients. The cache keeps no hook on it after a run.
        taps: names of the modules that SAD or AT compare, as in ``Distiller``; a distiller may take some of them. ()
            keeps the output alone, for KD.
        rows: N, rows of the data set; they are numbered from 0.
        example_inputs: a tuple of inputs of one small batch, for which the teacher is run once to see its shapes: under
            autocast if it is run so later.
        views: K, fixed views (augmented copies) of each row, numbered from 0.
        output, channels_last: as in ``Distiller``.
        path: of a file that holds the cache, mapped and not read into memory; None: in memory. A file that is there is
            taken up, with the rows that it has.
        data: what the rows are, as the hash of their source: a file of as many other rows is refused.
        max_bytes: the most that it may take.

    Nothing is allocated, and no file made, before the first ``add``, ``holds`` or look-up. ``num_bytes`` says how much
    it will be.

    Raises ValueError for more than ``max_bytes``, a file that is damaged or of another teacher (by the hash of its
    state, and not by what its modules do with it), other rows, taps, ``output`` or ``channels_last``, and TypeError for
    an output that is not one tensor.
    """

    def __init__(
        self,
        teacher: nn.Module,
        taps: Sequence[str],
        *,
        rows: int,
        example_inputs: Sequence[Any],
        views: int = 1,
        output: Pick = None,
        channels_last: bool | None = None,
        path: str | PathLike[str] | None = None,
        data: str = "",
        max_bytes: int = 1 << 30,
    ) -> None:
        if rows < 1 or views < 1:
            raise ValueError(f"sparsekd.TeacherCache: rows and views must be at least 1, got {rows} and {views}")
        if not isinstance(example_inputs, (tuple, list)):
            raise TypeError(
                "sparsekd.TeacherCache: example_inputs must be a tuple of inputs for the teacher, "
                f"got {type(example_inputs).__name__}; pass one small batch, e.g. (x[:2],)"
            )
        self.rows, self.views, self.data = rows, views, data
        self.path = None if path is None else Path(path)
        self._teacher = TappedNetwork("TeacherCache", teacher, output=output)
        if taps:
            self._teacher.attach(taps, example_inputs, channels_last)
        said, seen = self._run(example_inputs)
        self._output, self._shapes, self._dtype = tuple(said.shape[1:]), seen.shapes, _kept_dtype(said, seen)
        self._arrays = self._lay_out()
        self._kept: dict[str, Tensor] | None = None
        self._source: TeacherSource | None = None  # of the teacher as it is when the first row is asked for
        if self.num_bytes > max_bytes:
            raise ValueError(
                f"sparsekd.TeacherCache: {rows} rows in {views} view{'s' * (views > 1)} take {self.num_bytes} bytes, "
                f"{self.num_bytes // (rows * views)} each, and max_bytes is {max_bytes}; tap fewer layers, keep fewer "
                "rows or views, or allow more (with path= they lie in a file)"
            )

    @property
    def taps(self) -> tuple[str, ...]:
        return self._teacher.taps

    @property
    def num_bytes(self) -> int:
        """What it takes, in memory or in its file, all rows and views of it."""
        return num_bytes(self._arrays)

    def __repr__(self) -> str:
        where = "in memory" if self.path is None else f"in {self.path}"
        views = f"{self.views} view{'s' * (self.views > 1)}"
        return f"TeacherCache({self.rows} rows, {views}, taps {list(self.taps)}, {self.num_bytes} bytes {where})"

    def add(self, rows: Tensor, inputs: Sequence[Any], view: int = 0) -> None:
        """Run the teacher on these rows, int64 [B], and keep what it says; not where all of them are there already.

        inputs: of the teacher, for these rows in this view. Raises ValueError for rows or a view that there are not,
        and for features or outputs of other shapes than those of ``example_inputs``.
        """
        check_inputs("TeacherCache.add", inputs)
        places = self._places(rows, view)
        if bool(self._array("there").index_select(0, places).all()):
            return
        said, seen = self._run(inputs)
        if len(said) != len(places) or (tuple(said.shape[1:]), seen.shapes) != (self._output, self._shapes):
            raise ValueError(
                f"sparsekd.TeacherCache.add: expected an output [{len(places)}, *{self._output}] and features "
                f"{list(self._shapes)} of each row, got {tuple(said.shape)} and {list(seen.shapes)}; give all rows the "
                "same shape, and as many inputs as rows"
            )
        for name, values in (("output", said), ("means", seen.means), ("energy", seen.energy)):
            self._array(name)[places] = values.to("cpu", self._dtype)
        self._array("there")[places] = 1  # last: what a process that is killed had not finished is not there

    def __getitem__(self, key: Tensor | tuple[Tensor, int | Tensor]) -> TeacherTargets:
        """What the teacher says and sees of rows, int64 [B]: ``cache[rows]``, or ``cache[rows, view]``, the view a
        number or int64 [B]. On the CPU; ``.to(device)`` moves it.

        Raises ValueError for rows that have not been added.
        """
        rows, view = key if isinstance(key, tuple) else (key, 0)
        places = self._places(rows, view)
        there = self._array("there").index_select(0, places)
        if not bool(there.all()):
            missing = int(places[there == 0][0])
            raise ValueError(
                f"sparsekd.TeacherCache: row {missing // self.views} in view {missing % self.views} has not been "
                "added; run the teacher over all rows first: cache.add(rows, inputs)"
            )
        output, means, energy = (self._array(name).index_select(0, places) for name in ("output", "means", "energy"))
        return TeacherTargets(output, FeatureStats(means, energy, self._shapes), self.taps, self._source)

    def holds(self, rows: Tensor, view: int = 0) -> bool:
        """Whether all of these rows, int64 [B], are there."""
        return bool(self._array("there").index_select(0, self._places(rows, view)).all())

    @torch.no_grad()
    def synchronize(self) -> None:
        """Give every rank what the others have added: each runs the teacher on its share. Nothing on one rank.

        With ``path`` each rank needs a file of its own. Call it on all ranks.
        """
        if distributed.num_ranks() == 1:
            return
        device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
        there, mine = self._array("there"), dist.get_rank()
        # Of ranks that have the same row the first one sends it.
        owner = torch.where(there > 0, mine, distributed.num_ranks()).to(device, torch.int32)
        dist.all_reduce(owner, dist.ReduceOp.MIN)
        owner = owner.cpu()
        for name in ("output", "means", "energy"):
            if not self._array(name).numel():
                continue
            array = self._array(name).view(len(there), -1)
            at_once = max(1, _EXCHANGED // (array.shape[1] * array.element_size()))
            for part, owners in zip(array.split(at_once), owner.split(at_once), strict=True):
                sent = torch.where((owners == mine)[:, None], part, torch.zeros((), dtype=part.dtype)).to(device)
                dist.all_reduce(sent)
                part.copy_(sent)
        there.copy_(owner < distributed.num_ranks())

    @torch.no_grad()
    def _run(self, inputs: Sequence[Any]) -> tuple[Tensor, FeatureStats]:
        tapped = self._teacher
        with evaluation_mode(tapped.network):
            said, features = tapped.run(inputs)
            if tapped.tap is not None:
                tapped.tap.remove()
        nothing = said.new_zeros(len(said), 0)
        return said, feature_stats(features) if features else FeatureStats(nothing, nothing, ())

    def _lay_out(self) -> Arrays:
        count, dtype = self.rows * self.views, str(self._dtype).removeprefix("torch.")
        means, energy = stats_widths(self._shapes)
        return {
            "there": ((count,), "uint8"),
            "output": ((count, *self._output), dtype),
            "means": ((count, means), dtype),
            "energy": ((count, energy), dtype),
        }

    def _array(self, name: str) -> Tensor:
        if self._kept is None:
            self._source = self._teacher.source()
            self._kept = in_memory(self._arrays) if self.path is None else self._mapped(self.path, self._source)
        return self._kept[name]

    def _mapped(self, path: Path, source: TeacherSource) -> dict[str, Tensor]:
        description = {
            "version": VERSION,
            "teacher": _state_hash(self._teacher.network),
            "data": self.data,
            "rows": self.rows,
            "views": self.views,
            "taps": self.taps,
            "channels_last": source.channels_last,
            "picked": _in_words(source.picked),
            "output": self._output,
            "features": self._shapes,
            "dtype": str(self._dtype),
        }
        return mapped(path, description, self._arrays)

    def _places(self, rows: Tensor, view: int | Tensor) -> Tensor:
        """Where the rows lie in this view: [B], views of one row beside each other."""
        if not isinstance(rows, Tensor) or rows.dim() != 1 or rows.is_floating_point() or rows.dtype == torch.bool:
            got = f"{tuple(rows.shape)} {rows.dtype}" if isinstance(rows, Tensor) else type(rows).__name__
            raise ValueError(f"sparsekd.TeacherCache: rows must be a tensor of row numbers [B], got {got}")
        rows, view = rows.to("cpu", torch.int64), torch.as_tensor(view, dtype=torch.int64, device="cpu")
        for what, numbers, end in (("rows", rows, self.rows), ("view", view, self.views)):
            if numbers.numel() and not 0 <= int(numbers.min()) <= int(numbers.max()) < end:
                raise ValueError(
                    f"sparsekd.TeacherCache: {what} must lie in 0..{end - 1}, got {int(numbers.min())}.."
                    f"{int(numbers.max())}; they are numbered from 0"
                )
        return rows * self.views + view


def _kept_dtype(said: Tensor, seen: FeatureStats) -> torch.dtype:
    """Wide enough to lose nothing."""
    wide = torch.float64 in (said.dtype, seen.means.dtype)
    return torch.float64 if wide else torch.float32


def _in_words(which: Pick) -> str:
    return getattr(which, "__qualname__", type(which).__qualname__) if callable(which) else repr(which)


def _state_hash(model: nn.Module) -> str:
    """SHA-256 of all parameters and buffers, with their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
