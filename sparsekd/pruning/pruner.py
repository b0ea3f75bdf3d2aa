"""The pruner: plans, removes, rewinds, and keeps what is gone gone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import ASGD, LBFGS, Adagrad, Optimizer, Rprop

from ..blocks import BlockPattern
from ..distributed import agree
from .batch_norm import fed_batch_norms
from .grouping import Grouping
from .scores import choose_units, lamp_scores, layer_ranks, random_scores
from .surgery import state_slots
from .units import prunable_layers


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
        grouping: blocks that stay or go together; ``Grouping.for_device("cuda")`` leaves what GPU kernels like best.
        include, exclude: shell-style patterns on module names, as in ``sparsify``.
        scope: ``"global"`` compares scores over all layers; ``"layer"`` removes the same share from every layer.
        score: ``"magnitude"``, ``"lamp"`` (see :func:`lamp_scores`: global, but no layer goes almost whole), or
            ``"random"`` as a control (seeded by ``seed``).
        example_inputs: a tuple, see :meth:`observe`; needed before the first prune if the model has ``BatchNorm2d``.
        rewindable: remember all values now (theta0), for :meth:`rewind`. Costs a copy of the model.

    Under ``torch.compile`` every prune makes new shapes: call ``torch.compiler.reset()`` after one, or dynamo gives up
    compiling after its recompile limit (8).

    On several ranks all of them drop what rank 0 chooses: see ``sparsekd.distributed``.

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
        self._batch_norms = fed_batch_norms(self.model, convolutions, example_inputs)
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
            chosen = zip(self._layers, self._choose(sizes, remove), strict=True)
            entries = [keep[units.units_of_entries()] for units, keep in chosen]
            for units, keep in zip(self._layers, agree(entries, self._layers[0].parameter.device), strict=True):
                units.planned = int(units.entry_sizes()[keep].sum())
                units.keep(keep, self._optimizers)
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
        for _, parameter, zero, _ in self._held:
            parameter.masked_fill_(zero, 0)
            for state, key in state_slots(parameter, self._optimizers):
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
                list(state_slots(units.parameter, self._optimizers))
            except (TypeError, ValueError) as error:
                raise RuntimeError(f"Pruner.check: layer {units.name!r}: {error}") from error
        for held in self._held:
            state = [slot[key] for slot, key in state_slots(held.parameter, self._optimizers)]
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
