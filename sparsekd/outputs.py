"""Which part of a model's output is what its goal takes: models return dictionaries, tuples and objects too."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

__all__ = ["Pick", "check_tensor", "pick"]

Pick = str | int | Callable[[Any], Any] | None


def pick(caller: str, output: Any, which: Pick) -> Any:
    """The part of an output that ``which`` names: a key or attribute, a place in a tuple, or what a function returns.

    A plain tensor stays as it is under a name or a place: torchvision's networks return more in training alone.
    """
    if callable(which):
        return which(output)
    if which is None or isinstance(output, Tensor):
        return output
    try:
        if isinstance(which, str) and not isinstance(output, Mapping):
            return getattr(output, which)
        return output[which]
    except (AttributeError, IndexError, KeyError, TypeError):
        raise ValueError(
            f"sparsekd.{caller}: output={which!r} is not in the model's output, {_described(output)}"
        ) from None


def check_tensor(caller: str, output: Any) -> Any:
    """Raise TypeError unless an output is one tensor."""
    if not isinstance(output, Tensor):
        raise TypeError(
            f"sparsekd.{caller}: the goal takes one tensor, but the model returns {_described(output)}; say which part "
            "it is with output=, a name, a place or a function of the whole"
        )
    return output


def _described(output: Any) -> str:
    kind = type(output).__name__
    if isinstance(output, Mapping):
        return f"a {kind} of {', '.join(map(repr, output)) or 'nothing'}"
    if isinstance(output, (tuple, list)):
        return f"a {kind} of {len(output)}: {', '.join(type(each).__name__ for each in output)}"
    return f"a {kind}"
