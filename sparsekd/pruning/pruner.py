"""The pruner: plans, removes, brings back, rewinds, and keeps what is gone gone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..blocks import BlockPattern
from ..distributed import agree
from ..freeze.call import Example, call_arguments
from .batch_norm import first_batch_norm
from .budget import UNITS, Budget, Linear
from .choice import SCOPES, Meter, Rule, Scores, Unreachable, check_choice
from .copies import attach_copy
from .cost import CostTable
from .grouping import Grouping
from .held import Held
from .meters import Meters
from .observe import observe
from .rewind import Theta0, check_state
from .surgery import check_optimizer, forget, parameter_ids, state_slots
from .units import check_finite, check_there, drop, grow, of_gone, prunable_layers

COST_FLOOR = 0.02  # of the weights of a layer: less is seldom faster, and a layer that is nearly empty learns nothing


class Pruner:
    """Removes blocks, filters or weights of a model in training, brings them back, and keeps what is gone gone.

    Args:
        model: its layers are replaced by block-sparse ones in place, as by ``sparsify`` (except under
            ``"unstructured"``), which run as torch's own until their first block goes. Put it on its device first, and
            make the optimizer afterwards: the parameters are new.
        granularity: ``"block"`` (runs on the block-sparse kernels), ``"filter"`` (whole output rows; stored as blocks
            of 1 x C/groups), ``"unstructured"`` (dense layers under masks, for comparison: it makes nothing faster).
        pattern: block shape for ``"block"``; default ``BlockPattern.for_device`` of each layer.
        grouping: blocks that stay or go together; ``Grouping.for_device("cuda")`` leaves what GPU kernels like best.
        include, exclude: shell-style patterns on module names, as in ``sparsify``.
        scope: ``"global"`` compares scores over all layers; ``"layer"`` removes the same share from every layer;
            ``"cost"`` compares what units are worth for what they cost, in the unit of the budget: squared magnitudes
            (or LAMP's scores) for each multiply-add, or for each microsecond of a layer whose time still falls. What
            would not make its layer faster stays.
        score: ``"magnitude"``, ``"lamp"`` (see :func:`lamp_scores`: global, but no layer goes almost whole), or
            ``"random"`` as a control (seeded by ``seed``). Default: LAMP for scope ``"cost"``, since magnitudes of
            layers that differ in fan-in would decide more than their cost does; else magnitude.
        floor: share of the weights that every layer keeps at least; one unit stays in any case. Default: 0.02 for scope
            ``"cost"``, else 0.
        costs: microseconds of the layers, for budgets of ``latency_us``.
        example_inputs: as ``freeze`` takes them, see :meth:`observe`; needed before the first prune if the model has
            batch norm, and for budgets of ``macs``.
        rewindable: remember all values now (theta0), for :meth:`rewind`. Costs a copy of the model.

    Under ``torch.compile`` every prune makes new shapes: call ``torch.compiler.reset()`` after one, or dynamo gives up
    compiling after its recompile limit (8).

    On several ranks all of them drop, and bring back, what rank 0 chooses: see ``sparsekd.distributed``.

    Dead filters: where an output channel of a convolution has no kept weight left, its bias and the batch norm channel
    that it feeds are set to zero and held there, so that the channel is exactly 0 in training and evaluation. They are
    counted in ``num_dead_parameters``, not in ``num_kept``. Rows of linear layers do the same if they feed a batch
    norm, and keep their bias otherwise. A filter that gets a weight back lives again: see :meth:`grow_to`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        granularity: Literal["block", "filter", "unstructured"] = "block",
        pattern: BlockPattern | None = None,
        grouping: Grouping | None = None,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        scope: Literal["global", "layer", "cost"] = "global",
        score: Literal["magnitude", "lamp", "random"] | None = None,
        seed: int = 0,
        floor: float | None = None,
        costs: CostTable | None = None,
        example_inputs: Example | None = None,
        rewindable: bool = True,
    ) -> None:
        check_choice("granularity", granularity, ("block", "filter", "unstructured"))
        check_choice("scope", scope, SCOPES)
        score = score or ("lamp" if scope == "cost" else "magnitude")
        check_choice("score", score, ("magnitude", "lamp", "random"))
        if pattern is not None and granularity != "block":
            raise ValueError(f"Pruner: a pattern belongs to granularity 'block', got {pattern} with {granularity!r}")
        if grouping is not None and granularity != "block":
            raise ValueError(f"Pruner: a grouping belongs to granularity 'block', got {grouping} with {granularity!r}")
        self.model, self.granularity, self.scope, self.score = model, granularity, scope, score
        self._layers = prunable_layers(model, granularity, pattern, include, exclude, grouping)
        self._optimizers: list[Optimizer] = []
        self._theta0 = Theta0(model, self._layers)
        self._held = Held(model, self._layers)
        floor = (COST_FLOOR if scope == "cost" else 0.0) if floor is None else floor
        if not 0.0 <= floor < 1.0:
            raise ValueError(f"Pruner: floor must be a share in [0, 1) of the weights of every layer, got {floor}")
        self._rule = Rule(scope, score, floor, torch.Generator().manual_seed(seed))
        self._meters = Meters(model, self._layers, costs, floor, self.makes_faster)
        if example_inputs is not None:
            args, kwargs = call_arguments(example_inputs)
            self.observe(*args, **kwargs)
        self._held.bury(())
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
    def macs(self) -> tuple[float, float] | None:
        """Multiply-adds of the prunable layers for one example: (when dense, now); None before :meth:`observe`."""
        return self._meters.macs()

    @property
    def predicted_us(self) -> tuple[float, float] | None:
        """Microseconds of the frozen network by the costs given: (when dense, now); None without."""
        return self._meters.us()

    def cost(self, unit: str) -> tuple[float, float]:
        """(when dense, now) in a unit of budgets. Raises ValueError where nothing can count in it: see ``prune_to``."""
        meter = self._meters.of("Pruner.cost", unit)
        return meter.dense, meter.total(self._layers)

    @property
    def num_dead_parameters(self) -> int:
        """Biases and batch norm weights of dead filters: zero for good, and beyond what ``num_kept`` counts."""
        return self._held.num_dead_parameters

    @property
    def has_seen_example(self) -> bool:
        """Whether :meth:`observe` has run."""
        return self._meters.uses is not None

    @property
    def makes_faster(self) -> bool:
        """False for masks on dense layers: they cost as much as before."""
        return self.granularity != "unstructured"

    @property
    def observed(self) -> bool:
        """Whether :meth:`prune_to` knows which layer feeds which batch norm (or there is none to know)."""
        return self._held.observed

    def __str__(self) -> str:
        patterns = sorted({units.describe()["pattern"] for units in self._layers})
        unit = f"block {', '.join(patterns)}" if self.granularity == "block" else self.granularity
        note = "" if self.makes_faster else "; masks only, nothing gets faster"
        macs, us = self.macs, self.predicted_us
        work = "" if macs is None else f" and {1 - macs[1] / macs[0]:.1%} of {macs[0]:.0f} multiply-adds"
        time = "" if us is None else f"; {us[1]:.0f} of {us[0]:.0f} us predicted"
        return (
            f"Pruner({unit}, {self.scope} {self.score}: {self.removed_share:.1%} of {self.num_weights} weights{work} "
            f"in {len(self._layers)} layers removed{time}{note})"
        )

    def observe(self, *args: Any, **kwargs: Any) -> None:
        """Run the model once (eval mode, no gradient, no trace left) to see which layer feeds which batch norm, and how
        many multiply-adds each weight costs.

        A batch norm of any kind belongs to a layer if it gets the very tensor that the layer returned, unchanged.
        """
        seen = observe(self.model, self.layers(), args, kwargs)
        self._held.batch_norms, self._meters.uses = seen.batch_norms, seen.uses
        self._held.bury(self._optimizers)  # a model that was sparse before may have dead filters

    def attach(self, optimizer: Optimizer | nn.Module) -> None:
        """Shrink this optimizer's state along with the weights. Call it once for each optimizer of the model.

        A copy of the model that must keep its shapes, such as an average of its weights (``AveragedModel``), is
        attached the same way: it drops and gets back the blocks that the model does, and keeps its own values.
        """
        if isinstance(optimizer, nn.Module) and optimizer is not self.model:
            attach_copy(self._layers, optimizer)
            return
        optimizer = check_optimizer(optimizer)
        if not parameter_ids([optimizer]) & {id(units.parameter) for units in self._layers}:
            raise ValueError(
                "Pruner.attach: the optimizer holds none of the pruned layers' parameters; "
                "make it from model.parameters() after the Pruner, which replaces the layers"
            )
        if not any(optimizer is known for known in self._optimizers):
            self._optimizers.append(optimizer)

    def unattached(self) -> list[str]:
        """Names of pruned layers whose trainable weight is in no attached optimizer."""
        known = parameter_ids(self._optimizers)
        return [u.name for u in self._layers if u.parameter.requires_grad and id(u.parameter) not in known]

    @torch.no_grad()
    def prune_to(
        self,
        removed_share: float | Budget | None = None,
        scores: Scores | None = None,
        *,
        weights: float | None = None,
        macs: float | None = None,
        bytes: float | None = None,
        latency_us: float | None = None,
    ) -> None:
        """Remove units until a budget is met, exact to one unit: until a share of what there was ORIGINALLY is gone.

        One unit of every layer stays; the others then give more. Values, gradients and optimizer state shrink, dead
        filters take their bias and batch norm along. Nothing has changed if it raises.

        Args:
            removed_share: of the weights, in [0, 1): short for ``weights``; or a ``Budget``.
            scores: what to go by instead of the Pruner's ``score``: see :meth:`grow_to`. The lowest go.
            weights, macs, bytes, latency_us: one budget. A number below 1 is the share to be gone, of weights,
                multiply-adds, bytes, or of the predicted time of the whole network; a number above 1 is what stays:
                ``latency_us=80`` prunes until 80 us are left.

        Raises:
            ValueError: for two budgets, for one below what is gone already, for one that would empty a layer or pass a
                floor; for weights that are not finite; for an unobserved model with batch norm; for scores of other
                layers or shapes; for ``macs`` of a layer that the example never called.
            RuntimeError: if optimizers are attached but hold only some of the pruned weights, if the state of one
                cannot shrink, and for what :meth:`check` finds.
        """
        numbers = {"weights": weights, "macs": macs, "bytes": bytes, "latency_us": latency_us}
        budget, meter, now = self._read("prune_to", removed_share, numbers)
        remove = budget.excess(meter.dense, now)
        if self.is_past(budget):
            raise ValueError(f"Pruner.prune_to: {budget.describe_past(now, meter.dense)}")
        if remove > 0:
            try:
                keep = self._rule.kept(self._layers, meter, remove, scores)
            except Unreachable as error:
                raise ValueError(f"Pruner.prune_to: {error.describe(budget, meter.dense)}") from None
            drop(self._layers, self._agree(keep), self._optimizers)
        self._held.bury(self._optimizers)

    def check_reachable(self, budget: Budget) -> None:
        """Raise now the ValueError with which :meth:`prune_to` would refuse a budget that a floor forbids."""
        meter = self._meters.of("Pruner.check_reachable", budget.unit)
        try:
            self._rule.check(self._layers, meter, budget.excess(meter.dense, meter.total(self._layers)))
        except Unreachable as error:
            raise ValueError(f"Pruner.check_reachable: {error.describe(budget, meter.dense)}") from None

    def is_past(self, budget: Budget) -> bool:
        """Whether the network costs less already, by more than one unit: :meth:`prune_to` refuses such a budget."""
        meter = self._meters.of("Pruner.is_past", budget.unit)
        excess = budget.excess(meter.dense, meter.total(self._layers))
        return excess < 0 and excess < -meter.grain(self._layers)

    @torch.no_grad()
    def grow_to(
        self,
        removed_share: float | Budget | None = None,
        scores: Scores | None = None,
        *,
        weights: float | None = None,
        macs: float | None = None,
        bytes: float | None = None,
        latency_us: float | None = None,
    ) -> None:
        """Bring units back until a budget is met, exact to one unit: until only that share of the ORIGINAL is gone.

        What comes back is zero, in the model and in theta0, and its optimizer state is as if it had never been stepped;
        everything else keeps its bits. A dead filter that gets a weight back lives again: its bias and batch norm are
        let go, the latter at weight 1; its output starts a little above 0, where ReLU passes a gradient.

        Args:
            removed_share, weights, macs, bytes, latency_us: as in :meth:`prune_to`; not more than is gone.
            scores: layer's name -> a score for every block (every weight under ``"unstructured"``), in the shape of
                :meth:`masks`; the highest come back, under scope ``"cost"`` the highest for what they cost. What is
                kept already needs no meaningful score. A unit of several blocks gets their mean. Default: random ones,
                as in SET (Mocanu et al. 2018); ``DenseGradients`` has those of RigL (Evci et al. 2020).

        Raises:
            ValueError, RuntimeError: as :meth:`prune_to`.
        """
        numbers = {"weights": weights, "macs": macs, "bytes": bytes, "latency_us": latency_us}
        budget, meter, now = self._read("grow_to", removed_share, numbers)
        add = -budget.excess(meter.dense, now)
        if add < 0 and add < -meter.grain(self._layers):
            at = budget.amount(now, meter.dense)
            raise ValueError(f"Pruner.grow_to: the network is at {at}, got {budget.number:g}; prune_to removes more")
        if add > 0:
            growth, dead = self._growth(meter, add, scores), self._held.dead()
            grow(self._layers, growth, self._optimizers)
            self._held.revive(dead, self._theta0.rest or {})
        self._held.bury(self._optimizers)

    @torch.no_grad()
    def exchange(self, share: float, scores: Scores | None = None, *, unit: str = "weights") -> None:
        """Drop the weakest ``share`` of what is kept and bring back as much of the others, exact to one unit.

        One update of dynamic sparse training at an equal budget, as in SET and RigL. What was just dropped does not
        come back; the rest is as in :meth:`prune_to` and :meth:`grow_to`, which takes the ``scores``. What counts is
        what ``unit`` names: weights, ``"macs"`` or ``"bytes"``.

        Raises ValueError for ``"latency_us"``: what a unit takes depends on those beside it.
        """
        if not 0.0 <= share < 1.0:
            raise ValueError(f"Pruner.exchange: share must lie in [0, 1), got {share}")
        self._check_ready("exchange")
        meter = self._meters.of("Pruner.exchange", unit)
        if not isinstance(meter, Linear):
            raise ValueError(
                "Pruner.exchange: microseconds of single units do not add up, got unit='latency_us'; exchange macs, or "
                "prune_to and grow_to in turn"
            )
        now = meter.total(self._layers)
        moves, gone = share * now, meter.gone(self._layers)
        if moves > gone:
            raise ValueError(
                f"Pruner.exchange: a share of {share} is {moves:.0f} {UNITS[unit]}, but only {gone:.0f} are gone and "
                "could come back; prune first, or exchange less"
            )
        if moves == 0:
            return
        try:
            keep = self._agree(self._rule.kept(self._layers, meter, moves, None))
        except Unreachable as error:
            raise ValueError(f"Pruner.exchange: {error.describe(None, meter.dense)}") from None
        dropped = now - meter.left(self._layers, keep)
        growth = self._growth(meter, dropped, scores)  # among what is gone before the drop
        dead = self._held.dead()
        drop(self._layers, keep, self._optimizers)
        grow(self._layers, growth, self._optimizers)
        self._held.revive(dead, self._theta0.rest or {})
        self._held.bury(self._optimizers)

    def layers(self) -> dict[str, Any]:
        """Name -> layer, of all that are pruned."""
        return {units.name: units.layer for units in self._layers}

    def masks(self) -> dict[str, Tensor]:
        """Layer's name -> bool, what is kept: ``[ceil(K/bh), ceil(C/groups/bw), R, S]`` of a convolution's blocks,
        ``[ceil(out/bh), ceil(in/bw)]`` of a linear layer's; under ``"unstructured"`` the shape of the weight."""
        return {units.name: units.mask() for units in self._layers}

    @torch.no_grad()
    def snapshot(self) -> None:
        """Remember the values of now as theta0, instead of those of construction (late rewinding)."""
        self._theta0.remember()

    @torch.no_grad()
    def rewind(self, *, weights_only: bool = False) -> None:
        """Set the model back to theta0, bit for bit, without what was pruned; its momentum to 0.

        Everything in ``model.state_dict()`` goes back, batch norm with its running statistics too: what a lottery
        ticket is (Frankle & Carbin, arXiv 1803.03635). Buffers with ``persistent=False`` stay as they are. With
        ``weights_only`` only the surviving weights of the pruned layers go back.
        """
        self._theta0.restore(weights_only)
        self.reset_momentum()
        self._held.bury(self._optimizers)

    @torch.no_grad()
    def reset_momentum(self) -> None:
        """Make the optimizers forget this model's parameters (averages and step counters), as if training began now."""
        forget(self.model.parameters(), self._optimizers)

    @torch.no_grad()
    def after_step(self) -> None:
        """Call after every ``optimizer.step()``: what is gone stays zero, in the parameters and in the optimizers."""
        self._held.zero(self._optimizers)

    @torch.no_grad()
    def check(self) -> None:
        """Raise RuntimeError unless the weights kept are those planned, in the shape they should have, in the model."""
        check_there(self.model, self._layers)
        for units in self._layers:
            if units.num_kept != units.planned:
                raise RuntimeError(
                    f"Pruner.check: layer {units.name!r} keeps {units.num_kept} weights, planned were {units.planned}; "
                    "only the Pruner may change the blocks of its layers"
                )
            try:
                units.check()
                list(state_slots(units.parameter, self._optimizers))
            except (TypeError, ValueError) as error:
                raise RuntimeError(f"Pruner.check: layer {units.name!r}: {error}") from error
        self._held.check(self._optimizers)

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` needs to go on: tensors and JSON values, no pickle. The model's own state (the
        values) and the optimizers' are saved beside it by their own ``state_dict()``."""
        state: dict[str, Any] = {"settings": self._settings(), "batch_norms": self._held.batch_norms}
        state |= {"uses": self._meters.uses, "generator": self._rule.generator.get_state()}
        state |= {f"mask.{units.name}": units.mask() for units in self._layers}
        return state | self._theta0.state()

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the blocks, theta0 and random state of :meth:`state_dict`, on a new Pruner of the same dense model.

        The model's state may be loaded before or after, an optimizer's only after. Raises ValueError (TypeError for an
        optimizer that holds other shapes), before anything has changed, for the state of another model or settings.
        """
        check_state(state, self._settings(), self._layers, self._theta0, self._optimizers)
        for units in self._layers:
            units.theta0 = None  # that of construction, of the dense model's shape
            units.restrict(state[f"mask.{units.name}"], self._optimizers)
        self._theta0.load(state)
        self._held.batch_norms, self._meters.uses = state["batch_norms"], state.get("uses")
        self._rule.generator.set_state(state["generator"].cpu())
        self._held.collect()

    def _read(
        self, caller: str, removed_share: float | Budget | None, numbers: dict[str, float | None]
    ) -> tuple[Budget, Meter, float]:
        """The budget that a caller gave, what counts in its unit, and the cost of now."""
        budget = Budget.to_remove(f"Pruner.{caller}", removed_share, **numbers)
        self._check_ready(caller)
        meter = self._meters.of(f"Pruner.{caller}", budget.unit)
        return budget, meter, meter.total(self._layers)

    def _agree(self, entries: list[Tensor]) -> list[Tensor]:
        return agree(entries, self._layers[0].parameter.device)

    def _growth(self, meter: Meter, add: float, scores: Scores | None) -> list[tuple[Tensor, int]]:
        return of_gone(self._layers, self._agree(self._rule.growth(self._layers, meter, add, scores)))

    def _check_ready(self, caller: str) -> None:
        if not self.observed:
            raise ValueError(
                f"Pruner.{caller}: the model has {first_batch_norm(self.model)} layers, which must die with the "
                "filters that feed them; give Pruner(example_inputs=(x,)), or call observe(x) first"
            )
        if self._optimizers and self.unattached():
            raise RuntimeError(
                f"Pruner.{caller}: the weights of {', '.join(self.unattached())} are in no attached optimizer; "
                "attach() every optimizer that trains them"
            )
        check_finite(f"Pruner.{caller}", self._layers)
        self.check()

    def _settings(self) -> dict[str, Any]:
        layers = {units.name: units.describe() for units in self._layers}
        settings = {"granularity": self.granularity, "scope": self.scope, "score": self.score, "layers": layers}
        return settings | ({"floor": self._rule.floor} if self._rule.floor else {})
