"""The pruner: plans, removes, brings back, rewinds, and keeps what is gone gone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import ASGD, LBFGS, Adagrad, Optimizer, Rprop

from ..blocks import BlockPattern
from ..distributed import agree
from .batch_norm import first_batch_norm
from .choice import Rule, Scores
from .copies import attach_copy
from .grouping import Grouping
from .held import Held
from .surgery import state_slots
from .units import prunable_layers


class Pruner:
    """Removes blocks, filters or weights of a model in training, brings them back, and keeps what is gone gone.

    Args:
        model: its layers are replaced by block-sparse ones in place, as by ``sparsify`` (except under
            ``"unstructured"``). Put it on its device first, and make the optimizer afterwards: the parameters are new.
        granularity: ``"block"`` (runs on the block-sparse kernels), ``"filter"`` (whole output rows; stored as blocks
            of 1 x C/groups), ``"unstructured"`` (dense layers under masks, for comparison: it makes nothing faster).
        pattern: block shape for ``"block"``; default ``BlockPattern.for_device`` of each layer.
        grouping: blocks that stay or go together; ``Grouping.for_device("cuda")`` leaves what GPU kernels like best.
        include, exclude: shell-style patterns on module names, as in ``sparsify``.
        scope: ``"global"`` compares scores over all layers; ``"layer"`` removes the same share from every layer.
        score: ``"magnitude"``, ``"lamp"`` (see :func:`lamp_scores`: global, but no layer goes almost whole), or
            ``"random"`` as a control (seeded by ``seed``).
        example_inputs: a tuple, see :meth:`observe`; needed before the first prune if the model has batch norm.
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
        if grouping is not None and granularity != "block":
            raise ValueError(f"Pruner: a grouping belongs to granularity 'block', got {grouping} with {granularity!r}")
        self.model, self.granularity, self.scope, self.score = model, granularity, scope, score
        self._layers = prunable_layers(model, granularity, pattern, include, exclude, grouping)
        self._optimizers: list[Optimizer] = []
        self._rest0: dict[str, Tensor] | None = None  # theta0 of everything that is not pruned
        self._held = Held(model, self._layers)
        self._rule = Rule(scope, score, torch.Generator().manual_seed(seed))
        if example_inputs is not None:
            self.observe(*example_inputs)
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
    def num_dead_parameters(self) -> int:
        """Biases and batch norm weights of dead filters: zero for good, and beyond what ``num_kept`` counts."""
        return self._held.num_dead_parameters

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
        return (
            f"Pruner({unit}, {self.scope} {self.score}: {self.removed_share:.1%} of {self.num_weights} weights in "
            f"{len(self._layers)} layers removed{note})"
        )

    def observe(self, *example_inputs: Any) -> None:
        """Run the model once (eval mode, no gradient, no trace left) to see which layer feeds which batch norm.

        A batch norm of any kind belongs to a layer if it gets the very tensor that the layer returned, unchanged.
        """
        self._held.observe(example_inputs)
        self._held.bury(self._optimizers)  # a model that was sparse before may have dead filters

    def attach(self, optimizer: Optimizer | nn.Module) -> None:
        """Shrink this optimizer's state along with the weights. Call it once for each optimizer of the model.

        A copy of the model that must keep its shapes, such as an average of its weights (``AveragedModel``), is
        attached the same way: it drops and gets back the blocks that the model does, and keeps its own values.
        """
        if isinstance(optimizer, nn.Module) and optimizer is not self.model:
            attach_copy(self._layers, optimizer)
            return
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
    def prune_to(self, removed_share: float, scores: Scores | None = None) -> None:
        """Remove units until the share ``removed_share`` of the ORIGINAL weights is gone, exact to one unit.

        One unit of every layer stays; the others then give more. Values, gradients and optimizer state shrink, dead
        filters take their bias and batch norm along. Nothing has changed if it raises.

        Args:
            removed_share: in [0, 1).
            scores: what to go by instead of the Pruner's ``score``: see :meth:`grow_to`. The lowest go.

        Raises:
            ValueError: for a share outside [0, 1), below what is gone already, or that would empty a layer; for weights
                that are not finite; for an unobserved model with batch norm; for scores of other layers or shapes.
            RuntimeError: if optimizers are attached but hold only some of the pruned weights, if the state of one
                cannot shrink, and for what :meth:`check` finds.
        """
        self._check_ready("prune_to", removed_share)
        remove = removed_share * self.num_weights - (self.num_weights - self.num_kept)
        if remove < 0 and remove < -self._largest_unit():
            raise ValueError(
                f"Pruner.prune_to: {self.removed_share:.4f} of the weights are gone and do not come back, got "
                f"{removed_share}; grow_to brings weights back, or load an earlier checkpoint"
            )
        if remove > 0:
            self._drop(self._agree(self._rule.kept(self._layers, remove, scores)))
        self._held.bury(self._optimizers)

    @torch.no_grad()
    def grow_to(self, removed_share: float, scores: Scores | None = None) -> None:
        """Bring units back until only the share ``removed_share`` of the ORIGINAL weights is gone, exact to one unit.

        What comes back is zero, in the model and in theta0, and its optimizer state is as if it had never been stepped;
        everything else keeps its bits. A dead filter that gets a weight back lives again: its bias and batch norm are
        let go, the latter at weight 1; its output starts a little above 0, where ReLU passes a gradient.

        Args:
            removed_share: in [0, 1), not more than is gone.
            scores: layer's name -> a score for every block (every weight under ``"unstructured"``), in the shape of
                :meth:`masks`; the highest come back. What is kept already needs no meaningful score. A unit of several
                blocks gets their mean. Default: random ones, as in SET (Mocanu et al. 2018); ``DenseGradients`` has
                those of RigL (Evci et al. 2020).

        Raises:
            ValueError, RuntimeError: as :meth:`prune_to`.
        """
        self._check_ready("grow_to", removed_share)
        add = (self.num_weights - self.num_kept) - removed_share * self.num_weights
        if add < 0 and add < -self._largest_unit():
            raise ValueError(
                f"Pruner.grow_to: only {self.removed_share:.4f} of the weights are gone, got {removed_share}; "
                "prune_to removes weights"
            )
        if add > 0:
            self._grow(self._plan_growth(add, scores))
        self._held.bury(self._optimizers)

    @torch.no_grad()
    def exchange(self, share: float, scores: Scores | None = None) -> None:
        """Drop the weakest ``share`` of the weights kept and bring back as many others, exact to one unit.

        One update of dynamic sparse training at an equal budget, as in SET and RigL. What was just dropped does not
        come back; the rest is as in :meth:`prune_to` and :meth:`grow_to`, which takes the ``scores``.
        """
        self._check_ready("exchange", share)
        moves, gone = share * self.num_kept, self.num_weights - self.num_kept
        if moves > gone:
            raise ValueError(
                f"Pruner.exchange: a share of {share} is {moves:.0f} weights, but only {gone} are gone and could come "
                "back; prune first, or exchange less"
            )
        if moves == 0:
            return
        keep = self._agree(self._rule.kept(self._layers, moves, None))
        stays = sum(int(u.kept_sizes()[kept].sum()) for u, kept in zip(self._layers, keep, strict=True))
        growth = self._plan_growth(self.num_kept - stays, scores)  # among what is gone before the drop
        self._drop(keep)
        self._grow(growth)
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
        self._held.bury(self._optimizers)

    @torch.no_grad()
    def reset_momentum(self) -> None:
        """Make the optimizers forget this model's parameters (averages and step counters), as if training began now."""
        for optimizer in self._optimizers:
            for parameter in self.model.parameters():
                if isinstance(optimizer, Adagrad) and parameter in optimizer.state:
                    # The one whose state is made by its constructor and not by the first step.
                    optimizer.state[parameter]["sum"].fill_(optimizer.defaults["initial_accumulator_value"])
                    optimizer.state[parameter]["step"].zero_()
                else:
                    optimizer.state.pop(parameter, None)

    @torch.no_grad()
    def after_step(self) -> None:
        """Call after every ``optimizer.step()``: what is gone stays zero, in the parameters and in the optimizers."""
        self._held.zero(self._optimizers)

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
                list(state_slots(units.parameter, self._optimizers))
            except (TypeError, ValueError) as error:
                raise RuntimeError(f"Pruner.check: layer {units.name!r}: {error}") from error
        self._held.check(self._optimizers)

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` needs to go on: tensors and JSON values, no pickle. The model's own state (the
        values) and the optimizers' are saved beside it by their own ``state_dict()``."""
        state: dict[str, Any] = {"settings": self._settings(), "batch_norms": self._held.batch_norms}
        state["generator"] = self._rule.generator.get_state()
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

        The model's state may be loaded before or after, an optimizer's only after. Raises ValueError (TypeError for an
        optimizer that holds other shapes), before anything has changed, for the state of another model or settings.
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
        self._held.batch_norms = state["batch_norms"]
        self._rule.generator.set_state(state["generator"].cpu())
        self._held.collect()

    def _agree(self, entries: list[Tensor]) -> list[Tensor]:
        return agree(entries, self._layers[0].parameter.device)

    def _drop(self, keep: list[Tensor]) -> None:
        for units, entries in zip(self._layers, keep, strict=True):
            units.planned = int(units.kept_sizes()[entries].sum())
            units.keep(entries, self._optimizers)

    def _plan_growth(self, add: float, scores: Scores | None) -> list[tuple[Tensor, int]]:
        """For each layer a mask of what comes back, and the weights in it."""
        comes = zip(self._layers, self._agree(self._rule.growth(self._layers, add, scores)), strict=True)
        return [(units.mask_of_gone(entries), int(units.gone().sizes[entries].sum())) for units, entries in comes]

    def _grow(self, plan: list[tuple[Tensor, int]]) -> None:
        dead = self._held.dead()
        for units, (mask, num_weights) in zip(self._layers, plan, strict=True):
            units.planned = units.num_kept + num_weights
            units.grow(mask, self._optimizers)
        self._held.revive(dead, self._rest0 or {})

    def _check_ready(self, caller: str, share: float) -> None:
        if not 0.0 <= share < 1.0:
            name = "share" if caller == "exchange" else "removed_share"
            raise ValueError(f"Pruner.{caller}: {name} must lie in [0, 1), got {share}")
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
        for units in self._layers:
            if not torch.isfinite(units.parameter).all():
                raise ValueError(
                    f"Pruner.{caller}: expected finite weights, got NaN or infinity in layer {units.name!r}: training "
                    "has diverged; load a checkpoint from before, or lower the learning rate"
                )
        self.check()

    def _largest_unit(self) -> int:
        """Weights of it: no target is nearer."""
        return max(int(of_layer.max()) for units in self._layers if len(of_layer := units.kept().unit_sizes()))

    def _rest(self) -> Iterator[tuple[str, Tensor]]:
        """Everything of the model's state that is not the weight of a pruned layer. Shares memory with the model."""
        own = {id(tensor) for units in self._layers for tensor in units.own_tensors}
        for name, tensor in self.model.state_dict(keep_vars=True).items():  # a layer may have several names
            if id(tensor) not in own and isinstance(tensor, Tensor):
                yield name, tensor.detach()

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
            list(state_slots(units.parameter, self._optimizers))
            if bool((state[f"mask.{units.name}"].cpu() & ~units.mask().cpu()).any()):
                raise ValueError(
                    f"Pruner.load_state_dict: layer {units.name!r} no longer has all the blocks of this state; load it "
                    "into a Pruner of the freshly built dense model, or load the model's state first"
                )


def _parameter_ids(optimizers: Iterable[Optimizer]) -> set[int]:
    return {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"Pruner: {name} must be one of {', '.join(allowed)}, got {value!r}")
