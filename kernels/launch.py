"""A launch with all but its tensors decided, which costs the host a few microseconds where Triton's own costs twenty.

Triton looks at every argument of every call to find the code that suits it. Here sizes, constants and which tensors
there are stay what they were, and the pointers are multiples of 16, so the code found at the first call is kept.
"""

from __future__ import annotations

from typing import Any

import triton
from torch import Tensor

try:
    from triton import knobs  # since 3.4
except ImportError:
    knobs = None


def is_watched() -> bool:
    """Whether a profiler wants to know of each launch: then Triton itself launches, which tells it."""
    hook = knobs.runtime.launch_enter_hook
    return hook is not None and bool(getattr(hook, "calls", True))


class Launch:
    """``launch(*tensors)`` of a kernel whose parameters are pointers, sizes and constants, in this order."""

    def __init__(
        self, kernel: Any, grid: tuple[int, int], sizes: tuple[int, ...], constants: dict[str, Any], **options: int
    ) -> None:
        self._kernel, self._grid, self._sizes, self._constants = kernel, grid, sizes, constants
        self._options, self._rest = options, (*sizes, *constants.values())
        self._compiled: Any = None

    def __call__(self, *tensors: Tensor | None) -> None:
        compiled = self._compiled
        if compiled is None or is_watched():
            found = self._kernel[self._grid](*tensors, *self._sizes, **self._constants, **self._options)
            if knobs is not None and hasattr(found, "packed_metadata"):  # not interpreted
                self._compiled = found
            return
        driver = triton.runtime.driver.active
        stream = driver.get_current_stream(driver.get_current_device())
        what = (compiled.function, compiled.packed_metadata, None, None, None)
        compiled.run(*self._grid, 1, stream, *what, *tensors, *self._rest)
