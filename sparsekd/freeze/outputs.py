"""Two results of a network compared: tensors by their numbers, everything else by what it is."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

BF16_TOLERANCE = 5e-2
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: BF16_TOLERANCE}
_COMPARED = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


def leaves(value: Any) -> Iterator[Any]:
    """What is in a result: through containers, dataclasses and plain objects, whose attributes are their content."""
    yield from _leaves(value, ())


def _leaves(value: Any, inside: tuple[int, ...]) -> Iterator[Any]:
    if isinstance(value, (Tensor, np.ndarray, *_COMPARED)):
        yield value
        return
    if id(value) in inside or len(inside) > 50:  # an object that refers to itself
        return
    inside = (*inside, id(value))
    if isinstance(value, Mapping):
        for key in value:
            yield from _leaves(value[key], inside)
    elif isinstance(value, (list, tuple, torch.Size)):
        for one in value:
            yield from _leaves(one, inside)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _leaves(getattr(value, field.name, None), inside)
    elif hasattr(value, "__dict__") and not isinstance(value, type) and not callable(value):
        for one in vars(value).values():
            yield from _leaves(one, inside)
    else:
        yield type(value)  # opaque: there is nothing to compare but what it is


def tensors(value: Any) -> list[Tensor]:
    return [one for one in leaves(value) if isinstance(one, Tensor)]


def deviation(got: Any, want: Any, tolerance: float | None) -> float:
    """Largest difference of two results, as a multiple of what is allowed; infinity if they are built differently.

    tolerance: of floating-point numbers, relative to the largest finite one; None: by dtype. A tolerance that was given
    lets other numbers (positions, classes, truth values) differ: they may follow from the floats.
    """
    got, want = list(leaves(got)), list(leaves(want))
    if len(got) != len(want):
        return math.inf
    pairs = zip(got, want, strict=True)
    return max((_difference(a, b, tolerance is not None) / allowed(b, tolerance) for a, b in pairs), default=0.0)


def allowed(want: Any, tolerance: float | None) -> float:
    if tolerance is not None:
        return tolerance
    return _TOLERANCE.get(_real(getattr(want, "dtype", torch.float32)), _TOLERANCE[torch.float32])


def difference(got: Tensor, want: Tensor) -> float:
    """Largest difference of two tensors relative to the largest finite value."""
    return _difference(got, want, False)


def check_no_nan(expected: Any) -> None:
    """Raise ValueError if the outputs of the model hold NaN: nothing could be checked against them."""
    for y in tensors(expected):
        if (y.is_floating_point() or y.is_complex()) and y.isnan().any():
            raise ValueError(
                "sparsekd.freeze: the model gives NaN for example_inputs; check its buffers and the inputs"
            )


def _difference(got: Any, want: Any, follows: bool) -> float:
    if isinstance(want, np.ndarray) and isinstance(got, np.ndarray) and want.dtype.kind in "biufc":
        got, want = torch.from_numpy(got.copy()), torch.from_numpy(want.copy())
    if not isinstance(want, Tensor):
        return 0.0 if _same(got, want) else math.inf
    if not isinstance(got, Tensor) or got.shape != want.shape or got.dtype != want.dtype:
        return math.inf
    if not (want.is_floating_point() or want.is_complex()):
        return 0.0 if follows or torch.equal(got, want) else math.inf
    if want.numel() == 0 or torch.equal(got, want):
        return 0.0
    wide = torch.complex128 if want.is_complex() else torch.float64
    got, want, eps = got.to(wide), want.to(wide), torch.finfo(want.dtype).eps
    finite = want.isfinite()
    # Infinities have to stand where they stood; NaN may, where the model gives some for other inputs than the example.
    same = (got == want) | (got.isnan() & want.isnan())
    if not torch.equal(got.isfinite(), finite) or not bool(same[~finite].all()):
        return math.inf
    if not bool(finite.any()):
        return 0.0
    scale = max(want[finite].abs().max().item(), eps)
    return (got[finite] - want[finite]).abs().max().item() / scale


def _same(got: Any, want: Any) -> bool:
    if isinstance(want, np.ndarray):
        return type(got) is type(want) and got.shape == want.shape and got.dtype == want.dtype
    if isinstance(want, float) and isinstance(got, float):
        return math.isclose(got, want, rel_tol=1e-4) or (math.isnan(got) and math.isnan(want))
    return bool(type(got) is type(want) and got == want)


def _real(dtype: torch.dtype) -> torch.dtype:
    return dtype.to_real() if isinstance(dtype, torch.dtype) and dtype.is_complex else dtype


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The result with every tensor changed: through what torch's pytrees know, and dataclasses."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type) and not isinstance(value, Mapping):
        fields = {one.name: getattr(value, one.name) for one in dataclasses.fields(value) if one.init}
        return dataclasses.replace(value, **{name: map_tensors(function, one) for name, one in fields.items()})
    return pytree.tree_map(
        lambda one: function(one) if isinstance(one, Tensor) else _mapped(function, one),
        value,
    )


def _mapped(function: Callable[[Tensor], Tensor], leaf: Any) -> Any:
    known = dataclasses.is_dataclass(leaf) and not isinstance(leaf, type) and not isinstance(leaf, Mapping)
    return map_tensors(function, leaf) if known else leaf


__all__ = ["BF16_TOLERANCE", "allowed", "check_no_nan", "deviation", "difference", "leaves", "map_tensors", "tensors"]
