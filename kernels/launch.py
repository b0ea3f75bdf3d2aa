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
        self._options, self._blocks, self._rest = options, (*grid, 1), (*sizes, *constants.values())
        self._run: Any = None

    def __call__(self, *tensors: Tensor | None) -> None:
        run = self._run
        if run is None or is_watched():
            found = self._kernel[self._grid](*tensors, *self._sizes, **self._constants, **self._options)
            if knobs is not None and hasattr(found, "packed_metadata"):  # not interpreted
                driver = triton.runtime.driver.active
                self._device, self._stream = driver.get_current_device, driver.get_current_stream
                self._what = (found.function, found.packed_metadata, None, None, None)
                self._run = found.run
            return
        run(*self._blocks, self._stream(self._device()), *self._what, *tensors, *self._rest)
