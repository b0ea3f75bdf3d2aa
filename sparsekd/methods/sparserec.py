"""SparseRec: embedding tables of recommenders that are sparse from the first step to the last (arXiv 2411.12205).

    model = sparsekd.models.MF(task.sizes, dim=64, density=0.1)
    method = SparseRec(Plain(model, task.goal), (task.train.users, task.train.items), steps=5000)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    method.attach(optimizer)
    for inputs, target in batches:
        optimizer.zero_grad()
        method.loss(inputs, target).total.backward()
        optimizer.step()
        method.after_step()

Three ideas of the paper, each of which can be left out: masks start from a non-negative matrix factorisation of who
chose what; absent entries come back by their gradients summed over many batches; gradients are taken for a sample of
important rows alone. The paper's abstract says no more: sizes, intervals and what is important are ours.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import pairs
from ..distill import Distiller, Plain
from ..distributed import num_ranks, of_all_ranks
from ..nn.embedding_table import SparseTable
from ..ops.embedding import embedding_absent_, pack_mask
from ..pruning.entries import rekeep
from .base import part_of
from .nmf import nmf
from .tables import TableMethod, budget_of_bytes, largest

__all__ = ["SparseRec"]

START = 0.1  # root of the mean square of the entries that the masks of the factorisation begin with


class SparseRec(TableMethod):
    """Dynamic sparse training of the tables of a recommender, at an equal number of entries in every step. On several
    ranks all exchange the same entries, by the sums of what each of them has seen.

    Args:
        distiller: ``Plain``, or a ``Distiller`` of a dense teacher's scores with beta=0. Its student has ``tables``.
        interactions: (users [M], items [M]) that the student learns from; init="nmf" and sampling need them.
        steps: of the whole training: the exchange shrinks along a cosine over the share ``until`` of them.
        density, size_bytes: the budget: share of the entries, or bytes of the tables with their masks; by default the
            entries that the tables keep as they are. Over all tables together, at least one in every row.
        init: "nmf", or "random": the masks that the tables have.
        sweeps: of the factorisation.
        values: what the entries start from with init="nmf": "factors", those of the factorisation, or "normal" ones.
            With factors, rows that share a taste agree in sign from the first step on; by chance half of them would.
        accumulate: "signed" or "absolute" sums of the gradients of absent entries since the last exchange, or "last":
            those of the last batch alone, as RigL does.
        every: steps between two exchanges.
        exchanged: share of the entries that the first exchange would drop; 0 leaves the masks as they start.
        sample: share of the rows of a batch that get a gradient, drawn by importance without replacement; 1: all.
            A row is as important as it has interactions.

    A table that is frozen keeps its entries, and the row of a ``padding_idx`` stays zero.

    Raises ValueError for options or interactions out of range, a budget too small for one entry in every row, tables of
    a pair with other dimensions than each other, and a frozen one with init="nmf".
    """

    name: ClassVar[str] = "sparserec"

    def __init__(
        self,
        distiller: Distiller | Plain,
        interactions: tuple[Tensor, Tensor] | None = None,
        *,
        steps: int,
        density: float | None = None,
        size_bytes: float | None = None,
        init: str = "nmf",
        sweeps: int = 30,
        values: str = "factors",
        accumulate: str = "signed",
        every: int = 100,
        exchanged: float = 0.1,
        until: float = 0.75,
        sample: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__(distiller)
        _check(interactions, steps, sweeps, init, values, accumulate, every, exchanged, until, sample)
        if interactions is not None:
            interactions = self._checked(interactions, init)
        self.steps, self.every, self.exchanged, self.until = steps, every, exchanged, until
        self.accumulate, self.sample, self.step = accumulate, sample, 0
        self._settings: dict[str, Any] = {"init": init, "sweeps": sweeps, "values": values, "seed": seed}
        self._settings |= {"density": density, "size_bytes": size_bytes}
        self.budget = self._budget(density, size_bytes)
        self._generator = torch.Generator().manual_seed(seed)
        if init == "nmf" and interactions is not None:
            self._start_from(interactions, sweeps, values, seed)
        elif self.budget != self.num_kept:
            self._resize()
        self._absent = [_Absent(table) for table in self.tables]
        self._importance = self._degrees(interactions) if sample < 1 and interactions is not None else None
        self._drawn: list[Tensor | None] = [None] * len(self.tables)  # of the lookup that is under way
        self._hooks: list[Any] = []
        for place, table in enumerate(self.tables):
            self._hooks.append(table.register_forward_hook(partial(self._watch, place), with_kwargs=True))
            if self._importance is not None:
                before = partial(self._sample, place)
                self._hooks.append(table.register_forward_pre_hook(before, with_kwargs=True))

    def after_step(self) -> None:
        """Count the step; exchange entries where it is time to."""
        self.step += 1
        if self.step == self.steps + 1 and self.exchanged:
            warnings.warn(
                f"SparseRec: this is step {self.step} of {self.steps}, and entries have not been exchanged since step "
                f"{round(self.until * self.steps)}; give steps= of the whole training",
                stacklevel=2,
            )
        last = self.until * self.steps
        if self.exchanged and self.step % self.every == 0 and self.step < last:
            share = self.exchanged / 2 * (1 + math.cos(math.pi * self.step / last))
            self._exchange(round(share * self.budget))
        if self.num_kept != self.budget:
            raise RuntimeError(
                f"SparseRec: the tables keep {self.num_kept} entries, not the {self.budget} of the budget; something "
                "else prunes them too"
            )

    def level(self, epoch: int) -> float:
        density = self._settings["density"]
        return super().level(epoch) if density is None else round(density, 6)

    def close(self) -> None:
        """Take the hooks off the tables: after training, where the model lives on."""
        for hook in self._hooks:
            hook.remove()

    def state_dict(self) -> dict[str, Any]:
        state = {**super().state_dict(), "step": self.step, "sampling": self._generator.get_state()}
        for place, absent in enumerate(self._absent):
            state |= {f"absent.{place}.{name}": value for name, value in absent.state_dict().items()}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.step = state["step"]
        self._generator.set_state(state["sampling"])
        for place, absent in enumerate(self._absent):
            absent.load_state_dict(part_of(state, f"absent.{place}."))

    def _describe_plan(self) -> dict[str, Any]:
        own = ("steps", "every", "exchanged", "until", "accumulate", "sample", "budget")
        return {**super()._describe_plan(), **{name: getattr(self, name) for name in own}, **self._settings}

    def _budget(self, density: float | None, size_bytes: float | None) -> int:
        if density is not None and size_bytes is not None:
            raise ValueError(f"SparseRec: expected density or size_bytes, got both, {density} and {size_bytes}")
        if size_bytes is not None:
            return budget_of_bytes(self.tables, size_bytes)
        if density is None:
            return self.num_kept
        rows = sum(table.num_embeddings for table in self.tables)
        if not 0 < density <= 1 or round(density * self.num_entries) < rows:
            raise ValueError(
                f"SparseRec: density must lie in [{rows / self.num_entries:.4g}, 1], where every row keeps an entry, "
                f"got {density}"
            )
        return round(density * self.num_entries)

    @torch.no_grad()
    def _start_from(self, interactions: tuple[Tensor, Tensor], sweeps: int, values: str, seed: int) -> None:
        """Masks of the largest entries of factors whose rows have length 1, and new values of deviation START."""
        factors = []
        for place, (users, items) in enumerate(self.pairs):
            sizes = users.num_embeddings, items.num_embeddings, users.embedding_dim
            factors += list(nmf(*interactions, *sizes, sweeps=sweeps, seed=seed + place))
        scores = [nn.functional.normalize(factor).to(self.tables[0].values.device) for factor in factors]
        for table, score in zip(self.tables, scores, strict=True):
            if table.padding_idx is not None:
                score[table.padding_idx] = 0  # it learns nothing, so that one entry is enough
        for table, mask, score in zip(self.tables, largest(scores, self.budget), scores, strict=True):
            rekeep(table, pack_mask(mask), self.optimizers)
            start = score[mask]
            if values == "normal":
                start = torch.randn(table.values.shape, generator=self._generator).to(score.device)
            if table.padding_idx is not None:
                start[mask.nonzero()[:, 0] == table.padding_idx] = 0
            table.values.copy_(START * start / start.square().mean().sqrt())

    @torch.no_grad()
    def _resize(self) -> None:
        """Drop entries by chance down to the budget, or let absent ones come, as zeros. Frozen tables stay."""
        learning = [table for table in self.tables if table.values.requires_grad]
        budget = self.budget - (self.num_kept - sum(table.values.shape[0] for table in learning))
        least, most = (
            sum(table.num_embeddings * each for table, each in zip(learning, numbers, strict=True))
            for numbers in ([1] * len(learning), [table.embedding_dim for table in learning])
        )
        if not least <= budget <= most:
            raise ValueError(
                f"SparseRec: {budget} of {self.budget} entries are left for the tables that learn, which hold {least} "
                f"to {most}; give another density, or let the frozen ones learn"
            )
        scores = []
        for table in learning:
            mask = table.mask()
            scores.append(torch.rand(mask.shape, generator=self._generator).to(mask.device) + mask)
        for table, mask in zip(learning, largest(scores, budget), strict=True):
            rekeep(table, pack_mask(mask), self.optimizers)

    def _checked(self, interactions: tuple[Tensor, Tensor], init: str) -> tuple[Tensor, Tensor]:
        for users, items in self.pairs:
            sizes = users.num_embeddings, items.num_embeddings
            interactions = pairs.checked("methods.SparseRec", *interactions, *sizes)
        if init == "nmf" and not all(table.values.requires_grad for table in self.tables):
            raise ValueError(
                "SparseRec: init='nmf' gives every table new entries, and one is frozen; give init='random', which "
                "leaves it as it is"
            )
        return interactions

    def _degrees(self, interactions: tuple[Tensor, Tensor]) -> list[Tensor]:
        """How often each row of each table is in the interactions; at least once, so that all can be drawn."""
        return [
            torch.bincount(ids.cpu(), minlength=table.num_embeddings).clamp(min=1).float()
            for pair in self.pairs
            for table, ids in zip(pair, interactions, strict=True)
        ]

    def _sample(self, place: int, table: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Say which ids of a lookup are to have a gradient."""
        if not table.training or not torch.is_grad_enabled():
            return None
        rows, of_row = torch.unique(_ids_of(args, kwargs), return_inverse=True)
        drawn = self._draw(place, rows)
        self._drawn[place] = drawn
        return args, {**kwargs, "learns": drawn[of_row]}

    def _watch(self, place: int, table: nn.Module, args: tuple, kwargs: dict[str, Any], rows: Tensor) -> None:
        """See the gradient of the rows that a table has given out."""
        if table.training and rows.requires_grad and self._sums_now():
            ids = _ids_of(args, kwargs).reshape(-1)
            rows.register_hook(partial(self._sum_up, place, ids, self._drawn[place]))

    @torch.no_grad()
    def _sum_up(self, place: int, ids: Tensor, drawn: Tensor | None, grad: Tensor) -> None:
        """Add what the entries that are absent would have learnt, of rows in the sample; nothing of a batch whose
        gradient overflows, which a scaled loss skips."""
        flat = grad.reshape(-1, grad.shape[-1])
        rows, of_row = torch.unique(ids, return_inverse=True)
        sums = flat.new_zeros(len(rows), flat.shape[1]).index_add_(0, of_row, flat)
        if drawn is not None:
            rows, sums = rows[drawn], sums[drawn]
        if (padding := self.tables[place].padding_idx) is not None:
            sums = sums.masked_fill((rows == padding)[:, None], 0)
        sums = torch.where(torch.isfinite(sums).all(), sums, 0)
        self._absent[place].add(self.tables[place], rows, sums, self.accumulate == "absolute")

    def _sums_now(self) -> bool:
        if not self.exchanged or self.step >= self.until * self.steps:
            return False
        return self.accumulate != "last" or (self.step + 1) % self.every == 0

    def _draw(self, place: int, rows: Tensor) -> Tensor:
        """Bool [rows]: those in the sample."""
        assert self._importance is not None
        weights = self._importance[place][rows.cpu()]
        # The largest of u^(1/w) are a draw without replacement by weight (Efraimidis & Spirakis 2006).
        keys = torch.rand(len(weights), generator=self._generator).log() / weights
        drawn = torch.zeros(len(rows), dtype=torch.bool)
        drawn[keys.topk(max(1, round(self.sample * len(rows)))).indices] = True
        return drawn.to(rows.device)

    @torch.no_grad()
    def _exchange(self, moves: int) -> None:
        """Drop the `moves` smallest entries and bring back as many absent ones of the largest sums, as zeros."""
        for absent in self._absent:
            absent.gather()
        worth, where = zip(*(absent.candidates(table) for absent, table in self._counted()), strict=True)
        worths = torch.cat(worth)
        weakest = torch.cat([_magnitudes(table) for table in self.tables])
        if bool(weakest.isnan().any()):
            raise ValueError(
                "SparseRec: expected finite values in the tables, got NaN; load a checkpoint from before the divergence"
            )
        moves = min(moves, len(worths), int(weakest.isfinite().sum()))
        stays = torch.ones_like(weakest, dtype=torch.bool)
        stays[weakest.topk(moves, largest=False).indices] = False
        comes = torch.zeros_like(worths, dtype=torch.bool)
        comes[worths.topk(moves).indices] = True
        parts = zip(
            self.tables,
            where,
            stays.split([len(table.values) for table in self.tables]),
            comes.split([len(scores) for scores in worth]),
            strict=True,
        )
        for table, (rows, dims), stay, come in parts:
            kept = torch.ops.sparsekd.embedding_thin(*table.table[1:], stay)
            # An absent entry has its bit at zero, and each is named once: adding sets it.
            words = rows[come] * kept.shape[1] + dims[come] // 64
            kept.view(-1).index_add_(0, words, torch.ones_like(words) << dims[come] % 64)
            rekeep(table, kept, self.optimizers, agree=True)
        for absent in self._absent:
            absent.clear()

    def _counted(self) -> list[tuple[_Absent, SparseTable]]:
        return list(zip(self._absent, self.tables, strict=True))


class _Absent:
    """Summed gradients of the absent entries of the rows that were seen since the last exchange, and of no others."""

    def __init__(self, table: SparseTable) -> None:
        self._dim, self._like = table.embedding_dim, table.values
        dtype = torch.int32 if table.num_embeddings < 2**31 else torch.int64
        self._slot_of = torch.full((table.num_embeddings,), -1, dtype=dtype, device=table.values.device)
        self.clear()

    def clear(self) -> None:
        self._slot_of.fill_(-1)
        self.rows = torch.empty(0, dtype=torch.int64, device=self._like.device)
        self.sums = self._like.detach().new_zeros(0, self._dim)

    def add(self, table: SparseTable, rows: Tensor, grads: Tensor, absolute: bool) -> None:
        """The gradients [m, dim] of `rows [m]`, each once."""
        new = rows[self._slot_of[rows] < 0]
        slots = torch.arange(len(self.rows), len(self.rows) + len(new), dtype=self._slot_of.dtype, device=new.device)
        self._slot_of[new] = slots
        self.rows = torch.cat([self.rows, new])
        self.sums = torch.cat([self.sums, self.sums.new_zeros(len(new), self._dim)])
        places = self._slot_of[rows].long()
        total = self.sums[places]
        embedding_absent_(total, grads.to(total.dtype), table.kept, rows, absolute)
        self.sums[places] = total

    def gather(self) -> None:
        """Add up what all ranks have seen, each of them rows of its own batches."""
        if num_ranks() == 1:
            return
        rows, sums = of_all_ranks(self.rows), of_all_ranks(self.sums)
        self.rows, of_row = torch.unique(rows, return_inverse=True)
        self.sums = sums.new_zeros(len(self.rows), self._dim).index_add_(0, of_row, sums)

    def candidates(self, table: SparseTable) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """What absent entries are worth, those of 0 left out; and their rows and dimensions. None of a frozen table."""
        if not table.values.requires_grad:
            self.clear()
        place, dims = self.sums.nonzero(as_tuple=True)
        return self.sums[place, dims].abs(), (self.rows[place], dims)

    def state_dict(self) -> dict[str, Tensor]:
        return {"rows": self.rows, "sums": self.sums}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.clear()
        self.rows, self.sums = state["rows"].to(self.rows.device), state["sums"].to(self.sums.device)
        slots = torch.arange(len(self.rows), dtype=self._slot_of.dtype, device=self.rows.device)
        self._slot_of[self.rows] = slots


def _ids_of(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["input"]


def _magnitudes(table: SparseTable) -> Tensor:
    """Of every entry; infinity for what stays: the largest of every row, and all of a table that is frozen."""
    if not table.values.requires_grad:
        return torch.full_like(table.values.detach(), float("inf"), dtype=torch.float32)
    return torch.ops.sparsekd.embedding_magnitudes(table.values.detach(), *table.table[1:])


def _check(
    interactions: Sequence[Tensor] | None,
    steps: int,
    sweeps: int,
    init: str,
    values: str,
    accumulate: str,
    every: int,
    exchanged: float,
    until: float,
    sample: float,
) -> None:
    for name, value, choices in (
        ("init", init, ("nmf", "random")),
        ("values", values, ("factors", "normal")),
        ("accumulate", accumulate, ("signed", "absolute", "last")),
    ):
        if value not in choices:
            raise ValueError(f"SparseRec: {name} must be one of {', '.join(choices)}, got {value!r}")
    for name, number in (("steps", steps), ("sweeps", sweeps), ("every", every)):
        if number < 1:
            raise ValueError(f"SparseRec: {name} must be at least 1, got {number}")
    if not 0 <= exchanged < 1 or not 0 <= until <= 1 or not 0 < sample <= 1:
        raise ValueError(
            f"SparseRec: exchanged must lie in [0, 1), until in [0, 1] and sample in (0, 1], got {exchanged}, {until} "
            f"and {sample}"
        )
    if interactions is None and (init == "nmf" or sample < 1):
        raise ValueError(
            "SparseRec: init='nmf' and sample < 1 need interactions=(users, items); give them, or init='random' and "
            "sample=1"
        )
