"""Optimizers of packed embedding tables: a step touches the kept values of the rows that the batch touched.

    table = sparsekd.nn.SparseEmbedding(rows, dim, density=0.1, sparse=True)
    optimizer = sparsekd.optim.SparseAdam(table, lr=1e-3)       # or a whole model: all its tables with sparse=True
    rest = torch.optim.Adam(sparsekd.optim.other_parameters(model))

State is packed as the values are, with at most one number a row beside it; it follows
``sparsekd.pruning.exchange_entries`` and is saved by ``state_dict`` as any optimizer's. What a batch does not touch
stays: no momentum, no decay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .nn.embedding_table import SparseTable

__all__ = ["SparseAdagrad", "SparseAdam", "SparseSGD", "other_parameters"]

_ops = torch.ops.sparsekd
Tables = nn.Module | Iterable[SparseTable]


def other_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of a model that are no table with ``sparse=True``: for an optimizer of torch."""
    sparse = {id(table.values) for table in _tables_of(model)}
    return (parameter for parameter in model.parameters() if id(parameter) not in sparse)


class SparseOptimizer(Optimizer):
    """What the optimizers of tables share. ``state_of_rows``: names of state that has one number for each row."""

    state_of_rows: ClassVar[tuple[str, ...]] = ()

    def __init__(self, tables: Tables, defaults: dict[str, Any]) -> None:
        kind = type(self).__name__
        self._tables = _tables_of(tables)
        if not self._tables:
            raise ValueError(
                f"{kind}: expected a SparseEmbedding or SparseEmbeddingBag with sparse=True, or a model that has some, "
                f"got {type(tables).__name__} without any; set table.sparse = True where it is not"
            )
        for name in ("lr", "eps", "weight_decay", "initial_accumulator_value"):
            if not 0.0 <= defaults.get(name, 0.0) < math.inf:
                raise ValueError(f"{kind}: {name} must be a finite number >= 0, got {defaults[name]}")
        super().__init__([table.values for table in self._tables], defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step on what the gradients name; a table without gradient stays as it is."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for values in group["params"]:
                if values.grad is not None:
                    self._step_table(self._table_of(values), values, group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which would make all state of the dtype of the values."""
        super().load_state_dict(state_dict)
        parameters = (values for group in self.param_groups for values in group["params"])
        numbers = (number for group in state_dict["param_groups"] for number in group["params"])
        for values, number in zip(parameters, numbers, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                if isinstance(value, Tensor):
                    self.state[values][name] = value.to(values.device, copy=True)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_tables": self._tables}

    def _step_table(self, table: SparseTable, values: Tensor, group: dict[str, Any]) -> None:
        grad: Any = values.grad
        kind = type(self).__name__
        if not grad.is_sparse:
            raise TypeError(
                f"{kind}: expected a sparse gradient, got a dense one; make the layer with sparse=True, or use an "
                "optimizer of torch"
            )
        places, terms = grad._indices()[0], grad._values()
        if not bool((places[1:] > places[:-1]).all()):  # several lookups: autograd lists their terms one after another
            grad = grad.coalesce()
            places, terms = grad.indices()[0], grad.values()
        state = self.state[values]
        if not state:
            state.update(self._fresh(table, group))
        for name, value in state.items():
            wanted = table.kept.shape[:1] if name in self.state_of_rows else values.shape
            if value.shape != wanted:
                raise RuntimeError(
                    f"{kind}: the state {name!r} has shape {tuple(value.shape)}, the table {tuple(wanted)}; its "
                    "entries were changed without the optimizer: give it to sparsekd.pruning.exchange_entries"
                )
        self._update(table, state, places, terms, group)

    def _fresh(self, table: SparseTable, group: dict[str, Any]) -> dict[str, Tensor]:
        """State before the first step."""
        return {}

    def _update(
        self, table: SparseTable, state: dict[str, Tensor], places: Tensor, grad: Tensor, group: dict[str, Any]
    ) -> None:
        raise NotImplementedError

    def _table_of(self, values: Tensor) -> SparseTable:
        return next(table for table in self._tables if table.values is values)


class SparseSGD(SparseOptimizer):
    """``value -= lr * (gradient + weight_decay * value)``; no state.

    Args:
        tables: layers, or a model, all of whose tables with ``sparse=True`` are meant.
    """

    def __init__(self, tables: Tables, lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(tables, {"lr": lr, "weight_decay": weight_decay})

    def _update(
        self, table: SparseTable, state: dict[str, Tensor], places: Tensor, grad: Tensor, group: dict[str, Any]
    ) -> None:
        _ops.embedding_sgd_(table.values, places, grad, group["lr"], group["weight_decay"])


class SparseAdagrad(SparseOptimizer):
    """Adagrad (Duchi, Hazan, Singer 2011), as ``torch.optim.Adagrad`` without decay of the rate.

    Args:
        tables: layers, or a model, all of whose tables with ``sparse=True`` are meant.
        by_row: one sum for each row, of its mean square gradients, instead of one for each value.
    """

    state_of_rows = ("row_sum",)

    def __init__(
        self,
        tables: Tables,
        lr: float = 0.01,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        *,
        by_row: bool = False,
    ) -> None:
        options = {"lr": lr, "weight_decay": weight_decay, "eps": eps, "by_row": by_row}
        super().__init__(tables, options | {"initial_accumulator_value": initial_accumulator_value})

    def _fresh(self, table: SparseTable, group: dict[str, Any]) -> dict[str, Tensor]:
        name, like = ("row_sum", table.kept[:, 0]) if group["by_row"] else ("sum", table.values.detach())
        start = group["initial_accumulator_value"]
        return {name: torch.full(like.shape, start, dtype=_state_dtype(table), device=like.device)}

    def _update(
        self, table: SparseTable, state: dict[str, Tensor], places: Tensor, grad: Tensor, group: dict[str, Any]
    ) -> None:
        numbers = (group["lr"], group["eps"], group["weight_decay"])
        if group["by_row"]:
            _ops.embedding_adagrad_rows_(table.values, state["row_sum"], *table.table[1:], places, grad, *numbers)
        else:
            _ops.embedding_adagrad_(table.values, state["sum"], places, grad, *numbers)


class SparseAdam(SparseOptimizer):
    """Adam (Kingma & Ba 2015) whose moments move, and whose bias is corrected, by the steps that a row took part in.

    A row that is in every step moves as under ``torch.optim.Adam``; one that comes back after a thousand others takes
    its second step, not its thousandth. (``torch.optim.SparseAdam`` corrects by the steps of the whole table, so that a
    rare row's first step is up to ten times too small, or thirty times too large.) Beside the moments there are two
    bytes a row: a count that stops at 65535, from where the bias counts as gone.

    Args:
        tables: layers, or a model, all of whose tables with ``sparse=True`` are meant.
    """

    state_of_rows = ("occurred",)

    def __init__(
        self,
        tables: Tables,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"SparseAdam: betas must lie in [0, 1), got {betas}")
        super().__init__(tables, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def _fresh(self, table: SparseTable, group: dict[str, Any]) -> dict[str, Tensor]:
        moments = {
            name: torch.zeros_like(table.values, dtype=_state_dtype(table)) for name in ("exp_avg", "exp_avg_sq")
        }
        return {**moments, "occurred": torch.zeros_like(table.kept[:, 0], dtype=torch.int16).contiguous()}

    def _update(
        self, table: SparseTable, state: dict[str, Tensor], places: Tensor, grad: Tensor, group: dict[str, Any]
    ) -> None:
        _ops.embedding_adam_(
            table.values, state["exp_avg"], state["exp_avg_sq"], state["occurred"], *table.table[1:], places, grad,
            group["lr"], *group["betas"], group["eps"], group["weight_decay"],
        )  # fmt: skip


def _tables_of(tables: Tables) -> list[SparseTable]:
    modules = tables.modules() if isinstance(tables, nn.Module) else list(tables)
    found: list[SparseTable] = []
    for module in modules:
        if isinstance(module, SparseTable) and module.sparse:
            found.append(module)
        elif not isinstance(tables, nn.Module):
            got = type(module).__name__
            got += " with sparse=False" if isinstance(module, SparseTable) else ""
            raise TypeError(
                "sparsekd.optim: expected a model, or a list of its SparseEmbedding and SparseEmbeddingBag with "
                f"sparse=True, whose state lies as their entries do, got {got} in the list; pass the model itself"
            )
    return found


def _state_dtype(table: SparseTable) -> torch.dtype:
    """Moments of half types would lose what small steps add."""
    return torch.float64 if table.values.dtype == torch.float64 else torch.float32
