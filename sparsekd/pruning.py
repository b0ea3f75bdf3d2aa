"""Prune a model while it trains: scores, the choice of what goes, and the surgery on layers, optimizers and batch norm.

    pruner = Pruner(student, scope="global", example_inputs=(x,))   # converts the layers of `student` in place
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
    pruner.attach(optimizer)
    ...                                                             # after every optimizer.step(): pruner.after_step()
    pruner.prune_to(0.5)                                            # half of the original weights are gone
    pruner.rewind()                                                 # lottery ticket: survivors back to where they began

A *unit* is what stays or goes as a whole: a block, an output filter or a single weight. Counts are weights of the
pruned convolutions and linear layers (no biases, no batch norm), shares are of their ORIGINAL count.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import ASGD, LBFGS, Optimizer, Rprop

from .blocks import BlockPattern
from .convert import named_layers, sparsify
from .nn import SPARSE_TYPES, BlockSparseLayer

__all__ = [
    "LinearSchedule",
    "Pruner",
    "choose_units",
    "drop_blocks",
    "lamp_scores",
    "layer_ranks",
    "magnitude_scores",
    "random_scores",
]

_DENSE_TYPES = (nn.Linear, nn.Conv2d)


@dataclass(frozen=True)
class LinearSchedule:
    """Every ``every`` epochs, remove another ``rate`` of the ORIGINAL weights, from ``start`` until ``final`` is gone.

    Linear in the original count because that is the only reading under which the paper reaches its 60 % (arXiv
    2401.10484, Table 2). All shares lie in (0, 1), ``start`` may be 0.

    >>> LinearSchedule(rate=0.05, every=75, final=0.6).removed_after(epoch=160)
    0.1
    """

    rate: float
    every: int
    final: float
    start: float = 0.0

    def __post_init__(self) -> None:
        for name, share in (("rate", self.rate), ("final", self.final)):
            if not 0.0 < share < 1.0:
                raise ValueError(f"LinearSchedule: {name} must lie in (0, 1), got {share}; 0.05 is 5 % of the weights")
        if not isinstance(self.every, int) or isinstance(self.every, bool) or self.every < 1:
            raise ValueError(f"LinearSchedule: every must be a positive number of epochs, got {self.every!r}")
        if not 0.0 <= self.start < self.final:
            raise ValueError(
                f"LinearSchedule: start must lie in [0, final), got start {self.start} and final {self.final}"
            )

    @property
    def prunes(self) -> int:
        """How many prunes it takes to reach ``final``."""
        return math.ceil(round((self.final - self.start) / self.rate, 6))

    def removed_after(self, epoch: int) -> float:
        """Share of the original weights that is to be gone after epoch ``epoch`` (counted from 1)."""
        done = epoch // self.every
        return self.final if done >= self.prunes else self.start + self.rate * done

    def check_reaches(self, epochs: int) -> None:
        """Raise ValueError unless ``final`` is reached before the last of ``epochs`` epochs, which does not prune."""
        last_prune = self.prunes * self.every
        if last_prune >= epochs:
            raise ValueError(
                f"LinearSchedule: {self.prunes} prunes every {self.every} epochs reach {self.final} after epoch "
                f"{last_prune}, and at least one epoch must follow, got {epochs} epochs; "
                f"train {last_prune + 1} epochs, prune more at a time or more often, or lower final"
            )


def magnitude_scores(layer: BlockSparseLayer) -> Tensor:
    """``[nnzb]`` float64 on the CPU: root mean square of the weights in each kept block.

    The L2 norm over the square root of the block's real size: blocks of different sizes (the ragged last ones, other
    layers' patterns) are judged by how large their weights are, not by how many they have. For equal blocks it ranks as
    the L2 norm does, for single weights as their magnitude.
    """
    return (_energies(layer) / layer.blocks.block_sizes().cpu()).sqrt()


def random_scores(count: int, generator: torch.Generator | None = None) -> Tensor:
    """``[count]`` float64, uniform in [0, 1): the control that shows what choosing by magnitude is worth."""
    return torch.rand(count, dtype=torch.float64, generator=generator)


def lamp_scores(magnitudes: Tensor, sizes: Tensor) -> Tensor:
    """``[units]``: magnitude^2 over the energy of the layer once all weaker units are gone.

    LAMP (Lee et al., Layer-adaptive Sparsity for the Magnitude-based Pruning, ICLR 2021, equation 5), a unit's weights
    taken as equal. It ranks the units of a layer as their magnitude does, but does not change when the layer is scaled.
    Magnitudes alone, compared over layers, first of all compare fan-in: the blocks of one layer differ little as long
    as it is hardly trained, and the layer of the widest inputs can go almost whole.
    """
    strongest_first = magnitudes.argsort(descending=True, stable=True)
    squares = magnitudes[strongest_first].square()
    energy_left = (squares * sizes[strongest_first]).cumsum(0)
    scores = torch.empty_like(magnitudes)
    scores[strongest_first] = squares / energy_left.clamp(min=torch.finfo(magnitudes.dtype).tiny)
    return scores


def layer_ranks(scores: Tensor, sizes: Tensor, num_weights: int) -> Tensor:
    """``[units]`` in (0, 1): the share of the layer's original weights that is gone once this unit is half removed.

    Choosing by rank instead of score removes the same share, to one unit, from every layer.
    """
    order = _weakest_first(scores)
    ranks = torch.empty(len(scores), dtype=torch.float64)
    gone_before = num_weights - int(sizes.sum())
    ranks[order] = (gone_before + sizes[order].cumsum(0) - sizes[order] / 2).double() / num_weights
    return ranks


def choose_units(scores: Sequence[Tensor], sizes: Sequence[Tensor], remove: float) -> list[Tensor]:
    """Which units of each layer to keep (bool ``[units]``) so that the weights removed come nearest to ``remove``.

    The lowest scores go first, over all layers; among equals the later one. The best unit of every layer stays, however
    low its score: then the other layers give more, so that the total still holds, exact to one unit.

    Args:
        scores, sizes: for each layer ``[units]``, on the CPU: what a unit is worth, and the weights in it.
        remove: weights to remove.

    Raises:
        ValueError: for a score that is not finite, and if ``remove`` would empty a layer.
    """
    every_score, every_size = torch.cat(list(scores)), torch.cat(list(sizes))
    layer_starts = torch.tensor([0, *(len(layer) for layer in scores)]).cumsum(0).tolist()
    order = _weakest_first(every_score)
    stays = torch.zeros(len(every_score), dtype=torch.bool)
    stays[[start + int(layer.argmax()) for start, layer in zip(layer_starts, scores, strict=False)]] = True
    candidates = order[~stays[order]]
    removed = torch.cat([torch.zeros(1, dtype=torch.int64), every_size[candidates].cumsum(0)])
    if remove - int(removed[-1]) >= int(every_size.max()):
        raise ValueError(
            f"sparsekd.choose_units: at most {int(removed[-1])} of {int(every_size.sum())} weights can go, one unit of "
            f"each layer stays; got {remove:.0f} to remove; remove less, or use smaller blocks"
        )
    count = int((removed.double() - remove).abs().argmin())
    keep = torch.ones(len(every_score), dtype=torch.bool)
    keep[candidates[:count]] = False
    return list(keep.split([len(layer) for layer in scores]))


def _weakest_first(scores: Tensor) -> Tensor:
    if not torch.isfinite(scores).all():
        raise ValueError("sparsekd.pruning: expected finite scores, got NaN or infinity; look for diverged weights")
    return scores.argsort(descending=True, stable=True).flip(0)


def _energies(layer: BlockSparseLayer) -> Tensor:
    return layer.values.detach().cpu().double().square().sum((1, 2))


@torch.no_grad()
def drop_blocks(layer: BlockSparseLayer, keep: Tensor, optimizers: Iterable[Optimizer] = ()) -> None:
    """Drop the blocks that ``keep [nnzb]`` (bool) does not name: values, gradient and optimizer state shrink together.

    Works for every optimizer whose state tensors have their parameter's shape (SGD, Adam and its family, RMSprop,
    Adagrad). Raises TypeError, before anything has changed, for one that keeps something else (Adafactor, LBFGS).
    """
    values = layer.values
    slots = list(_state_slots(values, optimizers))
    grad = values.grad
    layer.keep_(keep)
    _forget_old_shape(values)
    values.grad = None if grad is None else grad[keep]
    for state, key in slots:
        state[key] = state[key][keep]


def _forget_old_shape(parameter: Tensor) -> None:
    """Make autograd look at the new shape of a parameter whose data was replaced.

    Its gradient accumulator remembers the old shape for as long as some graph is alive (the loss of the last batch is
    enough), and the next backward would raise. It is renewed only when the dtype changes, so change it for a moment.
    """
    data = parameter.data
    parameter.data = data.new_empty(0, dtype=torch.float32 if data.dtype == torch.float16 else torch.float16)
    parameter.data = data


def _state_slots(parameter: Tensor, optimizers: Iterable[Optimizer]) -> Iterator[tuple[dict[str, Any], str]]:
    """(state, key) of every optimizer state tensor that follows the shape of ``parameter`` (step counters do not)."""
    for optimizer in optimizers:
        state = optimizer.state.get(parameter, {})
        for key, value in state.items():
            if not isinstance(value, (Tensor, list)) or (isinstance(value, Tensor) and value.dim() == 0):
                continue
            if isinstance(value, list) or value.shape != parameter.shape:
                raise TypeError(
                    f"sparsekd.pruning: the state {key!r} of {type(optimizer).__name__} does not have the parameter's "
                    f"shape {tuple(parameter.shape)}, so it cannot shrink along; use SGD, Adam, AdamW or the like"
                )
            yield state, key


class _BlockUnits:
    """A block-sparse layer whose units are its blocks. ``theta0`` always has the shape of the values."""

    def __init__(self, name: str, layer: Any):
        self.name, self.layer = name, layer
        self.own_names = {f"{name}.{tensor}".lstrip(".") for tensor in ("values", "row_ptr", "col_idx")}
        self.theta0: Tensor | None = None
        self.planned = self.num_kept

    @property
    def parameter(self) -> nn.Parameter:
        return self.layer.values

    @property
    def num_weights(self) -> int:
        return self.layer.num_weights

    @property
    def num_kept(self) -> int:
        return self.layer.num_kept

    def sizes(self) -> Tensor:
        return self.layer.blocks.block_sizes().cpu()

    def magnitudes(self) -> Tensor:
        return magnitude_scores(self.layer)

    def drop(self, keep: Tensor, optimizers: Sequence[Optimizer]) -> None:
        self._keep_blocks(keep, optimizers)

    def _keep_blocks(self, keep: Tensor, optimizers: Sequence[Optimizer]) -> None:
        keep = keep.to(self.parameter.device)
        drop_blocks(self.layer, keep, optimizers)
        if self.theta0 is not None:
            self.theta0 = self.theta0[keep]

    def dead_outputs(self) -> Tensor:
        """Bool ``[K]``: output rows without a single kept weight."""
        row_ptr, pattern = self.layer.row_ptr, self.layer.pattern
        return (row_ptr[1:] == row_ptr[:-1]).repeat_interleave(pattern.bh)[: self.layer.weight_shape[0]]

    def always_zero(self) -> Tensor:
        """Bool, the values' shape: the padding of ragged blocks."""
        blocks = self.layer.blocks
        bh, bw = blocks.pattern.bh, blocks.pattern.bw
        device = blocks.values.device
        rows = blocks.row_block()[:, None] * bh + torch.arange(bh, device=device)
        cols = (blocks.col_idx.long() % blocks.pattern.grid(blocks.shape)[1])[:, None] * bw
        cols = cols + torch.arange(bw, device=device)
        return (rows >= blocks.shape[0])[:, :, None] | (cols >= blocks.shape[1])[:, None, :]

    def mask(self) -> Tensor:
        return self.layer.block_mask()

    def restrict(self, mask: Tensor, optimizers: Sequence[Optimizer]) -> None:
        """Keep the blocks that the block mask names (a subset of those kept now)."""
        rows = mask.flatten(2) if mask.dim() == 4 else mask[:, :, None]  # [Rb, Cb, R * S]
        in_order = rows.transpose(1, 2).flatten(1).to(self.parameter.device)  # columns as in col_idx
        keep = in_order[self.layer.blocks.row_block(), self.layer.col_idx.long()]
        self._keep_blocks(keep, optimizers)
        self.planned = self.num_kept

    def describe(self) -> dict[str, Any]:
        return {"shape": list(self.layer.weight_shape), "pattern": str(self.layer.pattern)}

    def check(self) -> None:
        self.layer.blocks.validate()


class _FilterUnits(_BlockUnits):
    """A block-sparse layer of pattern 1 x Cg whose units are whole output rows (a filter: R * S blocks)."""

    def _row_of_block(self) -> Tensor:
        """``[nnzb]``: which of the rows still alive each block belongs to."""
        return torch.unique_consecutive(self.layer.blocks.row_block().cpu(), return_inverse=True)[1]

    def sizes(self) -> Tensor:
        return self._sum_rows(self.layer.blocks.block_sizes().cpu())

    def magnitudes(self) -> Tensor:
        return (self._sum_rows(_energies(self.layer)) / self.sizes()).sqrt()

    def drop(self, keep: Tensor, optimizers: Sequence[Optimizer]) -> None:
        self._keep_blocks(keep[self._row_of_block()], optimizers)

    def _sum_rows(self, of_blocks: Tensor) -> Tensor:
        row = self._row_of_block()
        return of_blocks.new_zeros(int(row[-1]) + 1 if len(row) else 0).index_add_(0, row, of_blocks)


class _WeightUnits:
    """A dense layer whose units are single weights under a mask. ``theta0`` is the whole dense weight."""

    def __init__(self, name: str, layer: Any):
        self.name, self.layer = name, layer
        self.own_names = {f"{name}.weight".lstrip(".")}
        self.theta0: Tensor | None = None
        self._mask = torch.ones_like(layer.weight, dtype=torch.bool)
        self.planned = self.num_kept

    @property
    def parameter(self) -> nn.Parameter:
        return self.layer.weight

    @property
    def num_weights(self) -> int:
        return self.layer.weight.numel()

    @property
    def num_kept(self) -> int:
        return int(self._mask.sum())

    def sizes(self) -> Tensor:
        return torch.ones(self.num_kept, dtype=torch.int64)

    def magnitudes(self) -> Tensor:
        return self.parameter.detach()[self._mask].cpu().double().abs()

    def drop(self, keep: Tensor, optimizers: Sequence[Optimizer]) -> None:
        kept = self._mask.clone()
        kept[self._mask] = keep.to(kept.device)
        self.restrict(kept, optimizers)

    def dead_outputs(self) -> Tensor:
        return ~self._mask.flatten(1).any(1)

    def always_zero(self) -> Tensor:
        return ~self._mask

    def mask(self) -> Tensor:
        return self._mask.clone()

    def restrict(self, mask: Tensor, optimizers: Sequence[Optimizer]) -> None:
        self._mask = mask.to(self.parameter.device)
        if self.parameter.grad is not None:
            self.parameter.grad.masked_fill_(~self._mask, 0)
        self.planned = int(mask.sum())

    def describe(self) -> dict[str, Any]:
        return {"shape": list(self.layer.weight.shape), "pattern": "weights"}

    def check(self) -> None:
        """Nothing beyond the held zeros: a dense weight has no structure to go wrong."""


_Units = _BlockUnits | _WeightUnits


class _Held(NamedTuple):
    """Entries of a parameter that must be zero after every step; ``dead`` if they count as removed parameters."""

    name: str
    parameter: nn.Parameter
    zero: Tensor  # bool, the parameter's shape
    dead: bool


class Pruner:
    """Removes blocks, filters or weights of a model in training, and keeps what is gone gone.

    Args:
        model: its ``nn.Linear`` and ``nn.Conv2d`` layers are replaced by block-sparse ones in place (except under
            ``"unstructured"``). Put it on its device first, and make the optimizer afterwards: the parameters are new.
        granularity: ``"block"`` (runs on the block-sparse kernels), ``"filter"`` (whole output rows; stored as blocks
            of 1 x C/groups), ``"unstructured"`` (dense layers under masks, for comparison: it makes nothing faster).
        pattern: block shape for ``"block"``; default ``BlockPattern.for_device`` of each layer.
        include, exclude: shell-style patterns on module names, as in ``sparsify``.
        scope: ``"global"`` compares scores over all layers; ``"layer"`` removes the same share from every layer.
        score: ``"magnitude"``, ``"lamp"`` (see :func:`lamp_scores`: global, but no layer goes almost whole), or
            ``"random"`` as a control (seeded by ``seed``).
        example_inputs: a tuple, see :meth:`observe`; needed before the first prune if the model has ``BatchNorm2d``.
        rewindable: remember all values now (theta0), for :meth:`rewind`. Costs a copy of the model.

    Dead filters: where a convolution's output channel has no kept weight left, its bias and the batch norm channel that
    it feeds are set to zero and held there, so that the channel is exactly 0 in training and evaluation. They are
    counted in ``num_dead_parameters``, not in ``num_kept``. Rows of linear layers keep their bias.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        granularity: Literal["block", "filter", "unstructured"] = "block",
        pattern: BlockPattern | None = None,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        scope: Literal["global", "layer"] = "global",
        score: Literal["magnitude", "lamp", "random"] = "magnitude",
        seed: int = 0,
        example_inputs: Sequence[Any] | None = None,
        rewindable: bool = True,
    ) -> None:
        _check_choice("granularity", granularity, ("block", "filter", "unstructured"))
        _check_choice("scope", scope, ("global", "layer"))
        _check_choice("score", score, ("magnitude", "lamp", "random"))
        if pattern is not None and granularity != "block":
            raise ValueError(f"Pruner: a pattern belongs to granularity 'block', got {pattern} with {granularity!r}")
        self.model, self.granularity, self.scope, self.score = model, granularity, scope, score
        self._layers = _prunable_layers(model, granularity, pattern, include, exclude)
        self._optimizers: list[Optimizer] = []
        self._batch_norms: dict[str, list[str]] | None = None  # batch norm -> the convolutions that feed it
        self._rest0: dict[str, Tensor] | None = None  # theta0 of everything that is not pruned
        self._held: list[_Held] = []
        self._generator = torch.Generator().manual_seed(seed)
        if example_inputs is not None:
            self.observe(*example_inputs)
        self._bury_dead()
        if rewindable:
            self.snapshot()

    @property
    def num_weights(self) -> int:
        """Weights of the prunable layers when they were dense."""
        return sum(units.num_weights for units in self._layers)

    @property
    def num_kept(self) -> int:
        """Weights that are left, counted anew."""
        return sum(units.num_kept for units in self._layers)

    @property
    def removed_share(self) -> float:
        """``1 - num_kept / num_weights``."""
        return 1.0 - self.num_kept / self.num_weights

    @property
    def num_dead_parameters(self) -> int:
        """Biases and batch norm weights of dead filters: zero for good, and beyond what ``num_kept`` counts."""
        return sum(int(held.zero.sum()) for held in self._held if held.dead)

    @property
    def makes_faster(self) -> bool:
        """False for masks on dense layers: they cost as much as before."""
        return self.granularity != "unstructured"

    @property
    def observed(self) -> bool:
        """Whether :meth:`prune_to` knows which convolution feeds which batch norm (or there is none to know)."""
        has_batch_norm = any(isinstance(module, nn.BatchNorm2d) for module in self.model.modules())
        return self._batch_norms is not None or not has_batch_norm

    def __str__(self) -> str:
        patterns = sorted({units.describe()["pattern"] for units in self._layers})
        unit = f"block {', '.join(patterns)}" if self.granularity == "block" else self.granularity
        note = "" if self.makes_faster else "; masks only, nothing gets faster"
        return (
            f"Pruner({unit}, {self.scope} {self.score}: {self.removed_share:.1%} of {self.num_weights} weights in "
            f"{len(self._layers)} layers removed{note})"
        )

    def observe(self, *example_inputs: Any) -> None:
        """Run the model once (eval mode, no gradient, no trace left) to see which convolution feeds which batch norm.

        A ``BatchNorm2d`` belongs to a convolution if it gets the very tensor that the convolution returned, unchanged.
        """
        convolutions = {units.name: units.layer for units in self._layers if len(units.describe()["shape"]) == 4}
        self._batch_norms = _fed_batch_norms(self.model, convolutions, example_inputs)
        self._bury_dead()  # a model that was sparse before may have some

    def attach(self, optimizer: Optimizer) -> None:
        """Shrink this optimizer's state along with the weights. Call it once for each optimizer of the model."""
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"Pruner.attach: expected a torch optimizer, got {type(optimizer).__name__}")
        if isinstance(optimizer, (LBFGS, Rprop, ASGD)):
            raise TypeError(
                f"Pruner.attach: the state of {type(optimizer).__name__} can be neither shrunk nor set back; "
                "use SGD, Adam, AdamW or the like"
            )
        if not _parameter_ids([optimizer]) & {id(units.parameter) for units in self._layers}:
            raise ValueError(
                "Pruner.attach: the optimizer holds none of the pruned layers' parameters; "
                "make it from model.parameters() after the Pruner, which replaces the layers"
            )
        if not any(optimizer is known for known in self._optimizers):
            self._optimizers.append(optimizer)

    def unattached(self) -> list[str]:
        """Names of pruned layers whose trainable weight is in no attached optimizer."""
        known = _parameter_ids(self._optimizers)
        return [u.name for u in self._layers if u.parameter.requires_grad and id(u.parameter) not in known]

    @torch.no_grad()
    def prune_to(self, removed_share: float) -> None:
        """Remove units until the share ``removed_share`` of the ORIGINAL weights is gone, exact to one unit.

        One unit of every layer stays; the others then give more. Values, gradients and optimizer state shrink, dead
        filters take their bias and batch norm along. Nothing has changed if it raises.

        Raises:
            ValueError: for a share outside [0, 1), below what is gone already, or that would empty a layer; for weights
                that are not finite; for an unobserved model with ``BatchNorm2d``.
            RuntimeError: if optimizers are attached but hold only some of the pruned weights, if the state of one
                cannot shrink, and for what :meth:`check` finds.
        """
        if not 0.0 <= removed_share < 1.0:
            raise ValueError(f"Pruner.prune_to: removed_share must lie in [0, 1), got {removed_share}")
        self._check_ready()
        sizes = [units.sizes() for units in self._layers]
        remove = removed_share * self.num_weights - (self.num_weights - self.num_kept)
        if remove < -max(int(of_layer.max()) for of_layer in sizes):
            raise ValueError(
                f"Pruner.prune_to: {self.removed_share:.4f} of the weights are gone and do not come back, got "
                f"{removed_share}; load an earlier checkpoint"
            )
        if remove > 0:
            for units, of_layer, keep in zip(self._layers, sizes, self._choose(sizes, remove), strict=True):
                units.drop(keep, self._optimizers)
                units.planned = int(of_layer[keep].sum())
        self._bury_dead()

    @torch.no_grad()
    def snapshot(self) -> None:
        """Remember the values of now as theta0, instead of those of construction (late rewinding)."""
        for units in self._layers:
            units.theta0 = units.parameter.detach().clone()
        self._rest0 = {name: tensor.clone() for name, tensor in self._rest()}

    @torch.no_grad()
    def rewind(self, *, weights_only: bool = False) -> None:
        """Set the model back to theta0, bit for bit, without what was pruned; its momentum to 0.

        Everything goes back: surviving weights, biases, batch norm with its running statistics, embeddings: what a
        lottery ticket is (Frankle & Carbin, arXiv 1803.03635). With ``weights_only`` only the surviving weights of the
        pruned layers do.
        """
        if self._rest0 is None:
            raise RuntimeError("Pruner.rewind: there is no theta0; make the Pruner with rewindable=True or snapshot()")
        for units in self._layers:
            assert units.theta0 is not None
            units.parameter.copy_(units.theta0)
        if not weights_only:
            for name, tensor in self._rest():
                tensor.copy_(self._rest0[name])
        self.reset_momentum()
        self._bury_dead()

    @torch.no_grad()
    def reset_momentum(self) -> None:
        """Set the optimizers' averages and step counters of this model's parameters to 0, as if training began now."""
        for parameter in self.model.parameters():
            for state, key in list(_state_slots(parameter, self._optimizers)):
                state[key].zero_()
            for optimizer in self._optimizers:
                state = optimizer.state.get(parameter, {})
                if "step" in state:
                    state["step"] = state["step"] * 0

    @torch.no_grad()
    def after_step(self) -> None:
        """Call after every ``optimizer.step()``: what is gone stays zero, in the parameters and in the optimizers."""
        for _, parameter, zero, _ in self._held:
            parameter.masked_fill_(zero, 0)
            for state, key in _state_slots(parameter, self._optimizers):
                state[key].masked_fill_(zero, 0)

    @torch.no_grad()
    def check(self) -> None:
        """Raise RuntimeError unless the weights kept are those planned, and everything has the shape it should."""
        for units in self._layers:
            if units.num_kept != units.planned:
                raise RuntimeError(
                    f"Pruner.check: layer {units.name!r} keeps {units.num_kept} weights, planned were {units.planned}; "
                    "only the Pruner may change the blocks of its layers"
                )
            try:
                units.check()
                list(_state_slots(units.parameter, self._optimizers))
            except (TypeError, ValueError) as error:
                raise RuntimeError(f"Pruner.check: layer {units.name!r}: {error}") from error
        for held in self._held:
            state = [slot[key] for slot, key in _state_slots(held.parameter, self._optimizers)]
            if any(bool((tensor[held.zero] != 0).any()) for tensor in (held.parameter, *state)):
                raise RuntimeError(
                    f"Pruner.check: {held.name} has come back to life; call after_step() after every optimizer.step()"
                )

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` needs to go on: tensors and JSON values, no pickle. The model's own state (the
        values) and the optimizers' are saved beside it by their own ``state_dict()``."""
        state: dict[str, Any] = {"settings": self._settings(), "batch_norms": self._batch_norms}
        state["generator"] = self._generator.get_state()
        for units in self._layers:
            state[f"mask.{units.name}"] = units.mask()
            if units.theta0 is not None:
                state[f"theta0.{units.name}"] = units.theta0
        for name, tensor in (self._rest0 or {}).items():
            state[f"rest0.{name}"] = tensor
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the blocks, theta0 and random state of :meth:`state_dict`, on a new Pruner of the same dense model.

        The model's state may be loaded before or after. Raises ValueError, before anything has changed, for the state
        of another model or other settings.
        """
        self._check_state(state)
        for units in self._layers:
            units.theta0 = None  # that of construction, of the dense model's shape
            units.restrict(state[f"mask.{units.name}"], self._optimizers)
            theta0 = state.get(f"theta0.{units.name}")
            units.theta0 = None if theta0 is None else theta0.to(units.parameter.device, copy=True)
        rest0 = {name.removeprefix("rest0."): tensor for name, tensor in state.items() if name.startswith("rest0.")}
        has_theta0 = all(units.theta0 is not None for units in self._layers)
        self._rest0 = {name: tensor.clone() for name, tensor in rest0.items()} if has_theta0 else None
        self._batch_norms = state["batch_norms"]
        self._generator.set_state(state["generator"].cpu())
        self._hold_again()

    def _choose(self, sizes: list[Tensor], remove: float) -> list[Tensor]:
        if self.score == "random":
            scores = [random_scores(len(of_layer), self._generator) for of_layer in sizes]
        else:
            scores = [units.magnitudes() for units in self._layers]
        if self.score == "lamp":
            scores = [lamp_scores(score, size) for score, size in zip(scores, sizes, strict=True)]
        if self.scope == "layer":
            triples = zip(scores, sizes, self._layers, strict=True)
            scores = [layer_ranks(score, size, units.num_weights) for score, size, units in triples]
        return choose_units(scores, sizes, remove)

    def _check_ready(self) -> None:
        if not self.observed:
            raise ValueError(
                "Pruner.prune_to: the model has BatchNorm2d layers, which must die with the filters that feed them; "
                "give Pruner(example_inputs=(x,)), or call observe(x) first"
            )
        if self._optimizers and self.unattached():
            raise RuntimeError(
                f"Pruner.prune_to: the weights of {', '.join(self.unattached())} are in no attached optimizer; "
                "attach() every optimizer that trains them"
            )
        for units in self._layers:
            if not torch.isfinite(units.parameter).all():
                raise ValueError(
                    f"Pruner.prune_to: expected finite weights, got NaN or infinity in layer {units.name!r}: training "
                    "has diverged; load a checkpoint from before, or lower the learning rate"
                )
        self.check()

    def _rest(self) -> Iterator[tuple[str, Tensor]]:
        """Everything of the model's state that is not the weight of a pruned layer. Shares memory with the model."""
        own = set().union(*(units.own_names for units in self._layers))
        for name, tensor in self.model.state_dict().items():
            if name not in own and isinstance(tensor, Tensor):
                yield name, tensor

    @torch.no_grad()
    def _bury_dead(self) -> None:
        """Hold what has died, and make the running statistics of dead channels those of a channel that is always 0."""
        self._hold_again()
        self.after_step()
        for name, sources in (self._batch_norms or {}).items():
            batch_norm, dead = self._batch_norm(name), self._dead_inputs(sources)
            if batch_norm.track_running_stats and batch_norm.running_mean is not None:
                batch_norm.running_mean[dead] = 0
                batch_norm.running_var[dead] = 1

    def _hold_again(self) -> None:
        """Collect the entries that must be zero from now on."""
        held = [_Held(f"{units.name} weight", units.parameter, units.always_zero(), False) for units in self._layers]
        for units in self._layers:
            if len(units.describe()["shape"]) == 4 and units.layer.bias is not None:
                held.append(_Held(f"{units.name}.bias", units.layer.bias, units.dead_outputs(), True))
        for name, sources in (self._batch_norms or {}).items():
            batch_norm = self._batch_norm(name)
            if batch_norm.affine:
                dead = self._dead_inputs(sources)
                held.append(_Held(f"{name}.weight", batch_norm.weight, dead, True))
                held.append(_Held(f"{name}.bias", batch_norm.bias, dead, True))
        self._held = [entry for entry in held if bool(entry.zero.any())]

    def _batch_norm(self, name: str) -> Any:
        return self.model.get_submodule(name)

    def _dead_inputs(self, sources: list[str]) -> Tensor:
        by_name = {units.name: units for units in self._layers}
        return torch.stack([by_name[source].dead_outputs() for source in sources]).all(0)

    def _settings(self) -> dict[str, Any]:
        layers = {units.name: units.describe() for units in self._layers}
        return {"granularity": self.granularity, "scope": self.scope, "score": self.score, "layers": layers}

    def _check_state(self, state: dict[str, Any]) -> None:
        expected, saved = self._settings(), state.get("settings")
        if saved != expected:
            key = next((key for key in expected if not saved or saved.get(key) != expected[key]), "settings")
            got = saved.get(key) if saved else None
            raise ValueError(
                f"Pruner.load_state_dict: this state belongs to another model or another Pruner: expected {key} "
                f"{expected.get(key)}, got {got}; build the model and the Pruner as they were when it was saved"
            )
        shapes = {f"mask.{units.name}": units.mask().shape for units in self._layers}
        if any(name.startswith("rest0.") for name in state):
            shapes |= {f"rest0.{name}": tensor.shape for name, tensor in self._rest()}
        for name, shape in shapes.items():
            if name not in state or state[name].shape != shape:
                got = tuple(state[name].shape) if name in state else "nothing"
                raise ValueError(f"Pruner.load_state_dict: expected {name} of shape {tuple(shape)}, got {got}")
        for units in self._layers:
            if bool((state[f"mask.{units.name}"].cpu() & ~units.mask().cpu()).any()):
                raise ValueError(
                    f"Pruner.load_state_dict: layer {units.name!r} no longer has all the blocks of this state; load it "
                    "into a Pruner of the freshly built dense model, or load the model's state first"
                )


def _prunable_layers(
    model: nn.Module,
    granularity: str,
    pattern: BlockPattern | None,
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
) -> list[_Units]:
    """The layers to prune, converted in place as the granularity needs it. Layers that are sparse already stay so."""
    if granularity == "unstructured":
        units: list[_Units] = [_WeightUnits(n, m) for n, m in named_layers(model, _DENSE_TYPES, include, exclude)]
    else:
        found = dict(named_layers(model, (*_DENSE_TYPES, *SPARSE_TYPES), include, exclude))
        _make_sparse(model, found, granularity, pattern, include, exclude)
        kind = _FilterUnits if granularity == "filter" else _BlockUnits
        layers = {name: model.get_submodule(name) for name in found}
        units = [kind(name, layer) for name, layer in layers.items() if isinstance(layer, SPARSE_TYPES)]
    units = [each for each in units if each.num_kept]
    if not units:
        raise ValueError("Pruner: the model has no Linear or Conv2d layer to prune; look at include and exclude")
    return units


def _make_sparse(
    model: nn.Module,
    found: dict[str, nn.Module],
    granularity: str,
    pattern: BlockPattern | None,
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
) -> None:
    for name, layer in found.items():
        if granularity == "filter" and isinstance(layer, SPARSE_TYPES) and layer.pattern.bh != 1:
            raise ValueError(
                f"Pruner: layer {name!r} is block-sparse with pattern {layer.pattern}, whose blocks span several "
                "filters; densify(model) first, or use granularity 'block'"
            )
    dense = {name: layer for name, layer in found.items() if isinstance(layer, _DENSE_TYPES)}
    if granularity == "filter":
        for name, layer in dense.items():
            sparsify(model, BlockPattern(1, layer.weight.shape[1]), include=[name])
    elif include is None or dense:
        # Without `include`, sparsify leaves out grouped convolutions that the pattern does not fit.
        sparsify(model, pattern, include=None if include is None else list(dense), exclude=exclude)


@torch.no_grad()
def _fed_batch_norms(
    model: nn.Module, convolutions: dict[str, nn.Module], example_inputs: Sequence[Any]
) -> dict[str, list[str]]:
    """``{batch norm: convolutions}``: those that every time got the unchanged output of one of the convolutions."""
    outputs: dict[int, tuple[Tensor, int, str]] = {}  # holds the tensors, so that no id is used twice
    fed: dict[str, set[str | None]] = {}

    def note_output(name: str, output: Tensor) -> None:
        outputs[id(output)] = (output, output._version, name)

    def note_input(name: str, given: Any) -> None:
        _, version, source = outputs.get(id(given), (None, None, None))
        # An in-place operation (x += shortcut) leaves the same tensor with other contents.
        fed.setdefault(name, set()).add(source if source is not None and given._version == version else None)

    hooks = [
        layer.register_forward_hook(lambda _module, _args, output, name=name: note_output(name, output))
        for name, layer in convolutions.items()
    ]
    hooks += [
        module.register_forward_pre_hook(lambda _module, args, name=name: note_input(name, args[0] if args else None))
        for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d)
    ]
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        model(*example_inputs)
    finally:
        for module in training:
            module.training = True
        for hook in hooks:
            hook.remove()
    return {name: sorted(set(filter(None, sources))) for name, sources in fed.items() if None not in sources}


def _parameter_ids(optimizers: Iterable[Optimizer]) -> set[int]:
    return {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"Pruner: {name} must be one of {', '.join(allowed)}, got {value!r}")
