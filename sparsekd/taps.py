"""Feature taps: the outputs of a model's inner modules, beside its own output."""

from __future__ import annotations

import difflib
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .modes import uncompiled

__all__ = ["FeatureTap"]


class FeatureTap(nn.Module):
    """Calls a model and also returns the outputs of some of its sub-modules, in the order of `names`.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten())
    >>> tap = FeatureTap(model, ["1"])
    >>> output, features = tap(torch.rand(2, 3, 8, 8))
    >>> features[0].shape
    torch.Size([2, 8, 6, 6])

    `torch.compile(tap, fullgraph=True)` works; compile the tap, not the model inside it.

    The model keeps its parameters, buffers and state_dict names; it carries one forward hook for each name, idle unless
    the tap itself is running, until `remove()` or until the tap is deleted (a deepcopy made meanwhile keeps idle copies
    of them). No feature is kept after a call. Layers may be replaced later (`sparsify`): an eager call looks the names
    up again, a compiled one raises and asks for `attach()`.

    Raises ValueError for a name the model does not have (with the closest that it has) and RuntimeError when a tapped
    module did not run in a call, ran more than once, had its output overwritten by a later in-place operation, or ran
    without a graph inside a call with one (a re-entrant checkpoint): its feature could train nothing.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        if isinstance(names, str):
            raise TypeError(f"sparsekd.FeatureTap: names must be a list of module names, got a string; use [{names!r}]")
        if not names or len(set(names)) != len(names):
            raise ValueError(f"sparsekd.FeatureTap: expected one or more different names, got {list(names)}")
        if uncompiled(model) is not model:
            raise TypeError(
                "sparsekd.FeatureTap: got the result of torch.compile, whose inner modules run no hooks; "
                "tap the original model, then compile the tap: torch.compile(FeatureTap(model, names))"
            )
        self.model = model
        self.names = tuple(names)
        self.recorders = [_Recorder(name) for name in self.names]
        self._tapped: list[nn.Module] = []
        self._handles: list[RemovableHandle] = []
        self.attach()
        weakref.finalize(self, _remove_hooks, self._handles)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, list[Tensor]]:
        self._refresh()
        for recorder in self.recorders:
            recorder.outputs = []
        try:
            output = self.model(*args, **kwargs)
            features = [recorder.result() for recorder in self.recorders]
            if torch.is_grad_enabled():
                self._check_graphs()
            return output, features
        finally:
            for recorder in self.recorders:
                recorder.outputs = None

    def attach(self) -> None:
        """Looks the names up in the model as it now is and hooks those modules.

        Needed before a compiled call if layers were replaced since; the constructor and eager calls do it themselves.
        """
        modules = dict(self.model.named_modules(remove_duplicate=False))
        for name in self.names:
            if name not in modules:
                raise ValueError(_unknown_name(name, list(modules)))
        self.remove()
        self._tapped.extend(modules[name] for name in self.names)
        for recorder, module in zip(self.recorders, self._tapped, strict=True):
            self._handles.append(module.register_forward_hook(recorder))

    def remove(self) -> None:
        """Takes the hooks off the model; the next eager call or `attach()` puts them back."""
        _remove_hooks(self._handles)
        self._tapped.clear()

    def extra_repr(self) -> str:
        return f"names={list(self.names)}"

    def _check_graphs(self) -> None:
        cut_off = [recorder.name for recorder in self.recorders if not recorder.had_grad]
        if cut_off and any(parameter.requires_grad for parameter in self.model.parameters()):
            raise RuntimeError(
                f"sparsekd.FeatureTap: {', '.join(map(repr, cut_off))} ran under no_grad inside the model, so their "
                "features carry no graph and train nothing; use torch.utils.checkpoint with use_reentrant=False, tap a "
                "module outside, or call the tap under torch.no_grad() if that is meant"
            )

    def _refresh(self) -> None:
        if self._is_current():
            return
        if torch.compiler.is_compiling():  # hooks cannot be registered inside a graph
            raise RuntimeError(
                "sparsekd.FeatureTap: tapped modules were replaced since the tap was made; "
                "call tap.attach() before the compiled call"
            )
        self.attach()

    def _is_current(self) -> bool:
        return len(self._tapped) == len(self.names) and all(
            _find(self.model, name) is module for name, module in zip(self.names, self._tapped, strict=True)
        )


class _Recorder:
    """The forward hook of one tapped module. `outputs` is a list while the tap runs and None otherwise.

    `only_looks` says that a network without this hook computes the same: `freeze` leaves it out.
    """

    only_looks = True

    def __init__(self, name: str) -> None:
        self.name = name
        self.outputs: list[tuple[Any, int]] | None = None
        self.had_grad = True

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.outputs is not None:
            self.outputs.append((output, _version(output)))
            self.had_grad = torch.is_grad_enabled()

    def result(self) -> Tensor:
        outputs = self.outputs or []
        if len(outputs) != 1:
            raise RuntimeError(
                f"sparsekd.FeatureTap: module {self.name!r} must run once in a forward pass, got {len(outputs)} runs; "
                "tap a module on the path taken, and give every use of a shared module (one nn.ReLU for all) its own"
            )
        output, version = outputs[0]
        if not isinstance(output, Tensor):
            raise TypeError(
                f"sparsekd.FeatureTap: module {self.name!r} must return a tensor, got {type(output).__name__}; "
                "tap a sub-module of it"
            )
        if _version(output) != version:
            raise RuntimeError(
                f"sparsekd.FeatureTap: the output of {self.name!r} was changed in place by a later operation; "
                "tap that one, or make it out of place (nn.ReLU(inplace=False), x = x + y)"
            )
        return output


def _remove_hooks(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()


def _version(output: Any) -> int:
    """Counts in-place changes; 0 where torch does not count them (inference mode, compiled graphs)."""
    if torch.compiler.is_compiling() or not isinstance(output, Tensor) or output.is_inference():
        return 0
    return output._version


def _find(model: nn.Module, name: str) -> nn.Module | None:
    module: Any = model
    for part in name.split(".") if name else []:
        module = getattr(module, part, None)
    return module


def _unknown_name(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    hint = f"close matches: {', '.join(close)}" if close else f"it has: {', '.join(n for n in known if n)}"
    return f"sparsekd.FeatureTap: the model has no module named {name!r}; {hint}"
