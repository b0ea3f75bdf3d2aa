"""What lookups and bags share: a table whose rows keep some dimensions each (layout: sparsekd/ops/embedding.py).

State: ``values [n]`` (Parameter) and ``kept`` (int64 buffer); where rows begin follows from ``kept``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .. import ops
from ..ops._schema import DIRECT, nobody_looks_on
from ..ops.embedding import Table, count_kept, pack_mask, places, row_index, unpack_mask
from .layer import TracedWhole, computes_as, replace_data

Layer = TypeVar("Layer", bound="SparseTable")
_PIECE = 1 << 14  # rows that are made dense at once
_PIECE_OF_RANDOM = 1 << 10  # rows that are drawn at once, so that what is needed meanwhile is small


class Repacking(NamedTuple):
    """From the places of one set of kept entries to those of another."""

    kept: Tensor
    base: Tensor
    counts: Tensor
    new_kept: Tensor
    new_base: Tensor
    new_counts: Tensor
    num_values: int

    def __call__(self, packed: Tensor, fresh: float = 0.0) -> Tensor:
        """``[n]`` that lies as the values did to ``[num_values]`` as they do now; ``fresh`` where an entry is new."""
        return torch.ops.sparsekd.embedding_repack(packed, *self[:6], self.num_values, fresh)


class KnownTable(NamedTuple):
    """The table of a call without gradients that went well (``SparseTable._again``)."""

    table: Table
    shape: torch.Size  # of values: the data of a Parameter may be exchanged


class PackedState(nn.Module):
    """The state of a packed table, which is loaded from any that keeps entries of as many rows and dimensions."""

    values: Tensor
    kept: Tensor
    base: Tensor
    counts: Tensor
    embedding_dim: int

    def _make_room(self, count: int) -> None:
        """Give ``values`` room for so many entries."""
        raise NotImplementedError

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        notes = getattr(destination, "_metadata", {}).get(prefix[:-1])
        if notes is not None:  # the tensors say how many words a row has, but not how many dimensions
            notes["embedding_dim"] = self.embedding_dim

    def _load_from_state_dict(self, state_dict: dict, prefix: str, local_metadata: dict, *rest: Any) -> None:
        values, kept = (state_dict.get(prefix + name) for name in ("values", "kept"))
        if values is not None or kept is not None:
            if wrong := self._what_is_wrong(values, kept, prefix, local_metadata):
                rest[-1].append(wrong)
                return
            assert values is not None and kept is not None
            self._make_room(values.shape[0])
            self.base, self.counts = row_index(kept.to(self.kept.device))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    def _what_is_wrong(
        self, values: Tensor | None, kept: Tensor | None, prefix: str, notes: Mapping[str, Any]
    ) -> str | None:
        """With the state of a table, in words."""
        if values is None or kept is None:
            there, missing = ("kept", "values") if values is None else ("values", "kept")
            return (
                f"{prefix}{there}: expected {prefix}{missing} beside it, of the same table, got a state without; leave "
                "both out, or load both"
            )
        if kept.dtype != torch.int64 or kept.shape != self.kept.shape:
            return (
                f"{prefix}kept: expected int64 of shape {tuple(self.kept.shape)}, "
                f"got {kept.dtype} of shape {tuple(kept.shape)}"
            )
        dim = notes.get("embedding_dim", self.embedding_dim)
        if dim != self.embedding_dim:
            return f"{prefix}kept: expected rows of {self.embedding_dim} dimensions, got those of a table with {dim}"
        if _names_too_much(kept, self.embedding_dim):
            return f"{prefix}kept: names dimensions beyond the {self.embedding_dim} of this table"
        entries = int(count_kept(kept).sum())
        if values.shape != (entries,):
            return f"{prefix}values: kept names {entries} entries, got shape {tuple(values.shape)}"
        return None


class SparseTable(PackedState, TracedWhole):
    """The table of a layer, its making, its conversion and its state."""

    dense_type: ClassVar[type[nn.Module]]
    # Arguments of the torch layer that are not taken, and what they must be.
    untaken: ClassVar[dict[str, Any]] = {"max_norm": None, "scale_grad_by_freq": False}

    values: nn.Parameter
    kept: Tensor
    base: Tensor
    counts: Tensor
    num_embeddings: int
    embedding_dim: int
    padding_idx: int | None
    sparse: bool

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        sparse: bool = False,
        density: float | None = None,
        mask: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.sparse = sparse
        kind = type(self).__name__
        if num_embeddings < 1 or embedding_dim < 1:
            raise ValueError(
                f"{kind}: expected at least one row and one dimension, got {num_embeddings}, {embedding_dim}"
            )
        if mask is not None:
            kept = pack_mask(_checked_mask(kind, mask, num_embeddings, embedding_dim, density))
        else:
            kept = _random_rows(num_embeddings, embedding_dim, _budget(kind, num_embeddings, embedding_dim, density))
        values = torch.randn(int(count_kept(kept).sum()), dtype=dtype)
        self._adopt(num_embeddings, embedding_dim, padding_idx, values, kept)
        if self.padding_idx is not None:
            with torch.no_grad():
                mask, place = places(self.kept, torch.tensor([self.padding_idx]), embedding_dim)
                self.values[place[mask]] = 0
        self.to(device=torch.get_default_device() if device is None else device)

    @classmethod
    def from_dense(cls: type[Layer], dense: Any, *, density: float | None = None, mask: Tensor | None = None) -> Layer:
        """Convert a dense layer; it is left untouched.

        Args:
            density: share of the entries to keep, in (0, 1]: those of largest magnitude, at least one in every row; or
            mask: bool ``[rows, dim]`` of those to keep. By default all are kept.
        """
        kind = cls.__name__
        if not isinstance(dense, cls.dense_type):
            raise TypeError(f"{kind}.from_dense: expected nn.{cls.dense_type.__name__}, got {type(dense).__name__}")
        source: Any = dense
        if refusal := cls.refusal(source):
            raise ValueError(f"{kind}: expected a layer that looks up its rows as they are, got {refusal}")
        weight = source.weight.detach()
        rows, dim = weight.shape
        if mask is None:
            mask = _largest(weight, _budget(kind, rows, dim, 1.0 if density is None else density))
        else:
            mask = _checked_mask(kind, mask, rows, dim, density)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._adopt(rows, dim, source.padding_idx, weight[mask], pack_mask(mask))
        layer.values.requires_grad_(source.weight.requires_grad)
        layer.sparse = source.sparse
        layer._adopt_options(source)
        return layer.train(source.training)

    @classmethod
    def refusal(cls, dense: nn.Module) -> str:
        """Why the packed table cannot stand for this dense layer, or ""."""
        if not computes_as(dense, cls.dense_type):
            return f"{type(dense).__name__} with a forward of its own"
        for name, wanted in cls.untaken.items():
            if getattr(dense, name) != wanted:
                return f"{name}={getattr(dense, name)}; leave this layer dense"
        if "weight" not in dict(dense.named_parameters(recurse=False)):
            return f"{type(dense).__name__} whose weight is computed"
        return ""

    def to_dense(self) -> Any:
        """The torch layer with the same rows, zeros where no entry is kept."""
        dense: Any = self.dense_type(self.num_embeddings, self.embedding_dim, device="meta", **self._options())
        dense.weight = nn.Parameter(self.rows(), requires_grad=self.values.requires_grad)
        return dense.train(self.training)

    @torch.no_grad()
    def rows(self) -> Tensor:
        """``[rows, dim]``: the table made dense."""
        ids = torch.arange(self.num_embeddings, device=self.values.device)
        return torch.cat([ops.embedding(some, self.table, self.embedding_dim) for some in ids.split(_PIECE)])

    @property
    def table(self) -> Table:
        return Table(self.values, self.kept, self.base, self.counts)

    @property
    def density(self) -> float:
        """Kept entries over all entries."""
        return self.values.shape[0] / (self.num_embeddings * self.embedding_dim)

    def mask(self) -> Tensor:
        """Bool ``[rows, dim]`` of the kept entries, as ``from_dense(mask=)`` takes it."""
        return unpack_mask(self.kept, self.embedding_dim)

    def top_k(self, queries: Tensor, k: int, excluded: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """The best rows for each query, straight from the packed table: ``ops.embedding_top_k``. Where there are fewer
        than ``k`` rows the score is -infinity and the id -1."""
        if queries.shape[-1:] != (self.embedding_dim,):
            raise ValueError(
                f"{type(self).__name__}.top_k: queries must be [n, {self.embedding_dim}], got {tuple(queries.shape)}"
            )
        return ops.embedding_top_k(queries, self.table, k, excluded)

    @torch.no_grad()
    def rekeep_(self, kept: Tensor) -> Repacking:
        """Keep the entries that ``kept [rows, words]`` names instead; new ones are zero, the others keep their bits.
        ``values`` stays the same Parameter and loses its gradient.

        Returns:
            what takes any tensor that lies as the values did, such as the state of an optimizer, to where they lie now.
            ``sparsekd.pruning.exchange_entries`` does so for optimizers, and chooses the entries.
        """
        if kept.dtype != torch.int64 or kept.shape != self.kept.shape:
            raise ValueError(
                f"{type(self).__name__}.rekeep_: expected int64 of shape {tuple(self.kept.shape)}, got {kept.dtype} of "
                f"shape {tuple(kept.shape)}"
            )
        if _names_too_much(kept, self.embedding_dim):
            raise ValueError(
                f"{type(self).__name__}.rekeep_: kept names dimensions beyond the {self.embedding_dim} of this table"
            )
        repacking = Repacking(*self.table[1:], kept, *row_index(kept), int(count_kept(kept).sum()))
        replace_data(self.values, repacking(self.values.data))
        self.kept, self.base, self.counts = repacking.new_kept, repacking.new_base, repacking.new_counts
        return repacking

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        sparse = ", sparse=True" if self.sparse else ""
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}{sparse}, density={self.density:.3g}"

    def _own_gradient(self, learns: Tensor | None) -> bool:
        """Whether there is a gradient other than that of the plain op, which is what a graph of inference holds."""
        own = learns is not None or (self.sparse and torch.is_grad_enabled())
        return own and not torch.compiler.is_exporting()

    def _again(self, ids: Tensor) -> Table | None:
        """The table, where a call without gradients need neither check it nor pass the dispatcher: it is that of the
        last such call. Both take longer than the lookup of some hundred rows."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return None
        known: KnownTable | None = self.__dict__.get("_known")
        if known is None or ids.dtype is not torch.int64:
            return None
        table, buffers = known.table, self._buffers
        values = table.values
        if (
            self._parameters.get("values") is not values  # it may be computed from others
            or buffers.get("kept") is not table.kept
            or buffers.get("base") is not table.base
            or buffers.get("counts") is not table.counts
            or values.shape != known.shape
            or not nobody_looks_on((ids, values))
        ):
            return None
        return table

    def _remember(self) -> None:
        """That a call went well, for ``_again``."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or "embedding" not in DIRECT:
            return
        table = self.table
        if nobody_looks_on(table):
            self.__dict__["_known"] = KnownTable(table, table.values.shape)

    def _adopt(self, rows: int, dim: int, padding_idx: int | None, values: Tensor, kept: Tensor) -> None:
        if padding_idx is not None:
            if not -rows <= padding_idx < rows:
                raise ValueError(f"{type(self).__name__}: padding_idx must lie in [-{rows}, {rows}), got {padding_idx}")
            padding_idx %= rows
        self.num_embeddings, self.embedding_dim, self.padding_idx = rows, dim, padding_idx
        self.values = nn.Parameter(values)
        self.register_buffer("kept", kept)
        base, counts = row_index(kept)
        self.register_buffer("base", base, persistent=False)
        self.register_buffer("counts", counts, persistent=False)

    def _options(self) -> dict[str, Any]:
        return {"padding_idx": self.padding_idx, "sparse": self.sparse}

    def _adopt_options(self, dense: Any) -> None:
        """What a subclass takes over beside the table."""

    def _make_room(self, count: int) -> None:
        replace_data(self.values, self.values.data.new_empty(count))


def _budget(kind: str, rows: int, dim: int, density: float | None) -> int:
    """Entries that a table keeps, at least one in every row."""
    density = 1.0 if density is None else density
    if not 0 < density <= 1:
        raise ValueError(f"{kind}: density must lie in (0, 1], got {density}")
    budget = round(density * rows * dim)
    if budget < rows:
        raise ValueError(
            f"{kind}: a density of {density} keeps {budget} entries, fewer than the {rows} rows; every row keeps one "
            f"at least, so ask for {1 / dim:.4g} or more"
        )
    return budget


def _names_too_much(kept: Tensor, dim: int) -> bool:
    """Whether a row keeps dimensions that the table does not have."""
    spare = -dim % 64
    return bool(spare) and bool((kept[:, -1] >> (64 - spare) & ((1 << spare) - 1)).any())


def _checked_mask(kind: str, mask: Tensor, rows: int, dim: int, density: float | None) -> Tensor:
    if density is not None:
        raise ValueError(f"{kind}: expected density or mask, got both")
    if mask.dtype != torch.bool or mask.shape != (rows, dim):
        raise ValueError(f"{kind}: mask must be bool of shape {(rows, dim)}, got {mask.dtype} of {tuple(mask.shape)}")
    return mask


def _largest(weight: Tensor, budget: int) -> Tensor:
    """Mask of the largest entry of every row and of the largest others, ``budget`` in all."""
    magnitude = weight.abs().float()
    mask = torch.zeros_like(magnitude, dtype=torch.bool)
    mask.scatter_(1, magnitude.argmax(1, keepdim=True), True)
    others = magnitude.masked_fill(mask, -1).flatten().topk(budget - weight.shape[0]).indices
    mask.view(-1)[others] = True
    return mask


def _random_rows(rows: int, dim: int, budget: int) -> Tensor:
    """``kept`` of rows that keep as many dimensions each as the budget gives, a random few of them one more."""
    each, more = divmod(budget, rows)
    sizes = torch.full((rows,), each)
    sizes[torch.randperm(rows)[:more]] += 1
    most = int(sizes.max())
    kept = torch.empty(rows, -(-dim // 64), dtype=torch.int64)
    for some, target in zip(sizes.split(_PIECE_OF_RANDOM), kept.split(_PIECE_OF_RANDOM), strict=True):
        first = torch.rand(some.shape[0], dim).topk(most, largest=False).indices
        mask = torch.zeros(some.shape[0], dim, dtype=torch.bool)
        target.copy_(pack_mask(mask.scatter_(1, first, torch.arange(most) < some[:, None])))
    return kept
