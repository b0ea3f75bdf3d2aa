"""A model that answers while it is replaced: threads call it, another one swaps what is behind it.

    serving = ServingModel(sparsekd.freeze(model, inputs))
    serving(x)                                          # from any number of threads
    serving.swap(sparsekd.freeze(better, inputs), inputs)

Every answer is wholly that of one model: a call takes the model that is there when it begins and keeps it to its end.
Nobody waits for a swap, and a swap waits for nobody: it is one assignment, after the new model has been checked.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .freeze.call import Example, call_arguments
from .outputs import pick

__all__ = ["ServingModel"]


class _Served(NamedTuple):
    network: Callable[..., Any]
    version: int


class ServingModel:
    """What answers now, and its version, counted from 1.

    network: a frozen network, or any module (which is put into evaluation mode and must not be trained while it serves:
    give a copy), or None, if the first one is yet to come.
    """

    def __init__(self, network: Callable[..., Any] | None = None) -> None:
        self._swapping = threading.Lock()
        self._served: _Served | None = None
        if network is not None:
            self.swap(network)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.answer(*args, **kwargs)[0]

    def answer(self, *args: Any, **kwargs: Any) -> tuple[Any, int]:
        """(output, version of the model that gave it).  RuntimeError before the first model."""
        served = self._served  # read once: whatever is swapped in meanwhile is for the next call
        if served is None:
            raise RuntimeError("sparsekd.ServingModel: there is no model yet; swap(network) puts one in")
        with torch.no_grad():
            return served.network(*args, **kwargs), served.version

    @property
    def network(self) -> Callable[..., Any] | None:
        served = self._served
        return None if served is None else served.network

    @property
    def version(self) -> int:
        """0 before the first model."""
        served = self._served
        return 0 if served is None else served.version

    def swap(self, network: Callable[..., Any], example_inputs: Example | None = None) -> int:
        """Let `network` answer every call that begins from now on; returns its version.

        With example inputs (as of `freeze`: a tensor, several, or a mapping of keyword arguments) it has to answer them
        first, with finite numbers, and in the shape of the answer of before. Raises ValueError where it does not: then
        the old one stays.
        """
        if isinstance(network, nn.Module):
            network.eval()
        with self._swapping:
            if example_inputs is not None:
                self._check(network, *call_arguments(example_inputs))
            self._served = _Served(network, self.version + 1)
            return self._served.version

    def _check(self, network: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with torch.no_grad():
            answer = pick("ServingModel.swap", network(*args, **kwargs), None)
            if isinstance(answer, Tensor) and not torch.isfinite(answer).all():
                raise ValueError(
                    "sparsekd.ServingModel.swap: the new model answers NaN or infinity, so that the old one stays; "
                    "look for weights that have diverged"
                )
            if self._served is None or not isinstance(answer, Tensor):
                return
            before = self._served.network(*args, **kwargs)
        if not isinstance(before, Tensor) or before.shape != answer.shape or before.dtype != answer.dtype:
            got, had = (f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else str(x) for x in (answer, before))
            raise ValueError(
                f"sparsekd.ServingModel.swap: the new model answers {got} where the old one answers {had}, so that the "
                "old one stays; swap in a model of the same task"
            )
