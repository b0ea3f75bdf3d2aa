"""The allocator behind CPU tensors."""

from __future__ import annotations

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def keep_freed_memory() -> bool:
    """Have glibc's malloc keep freed memory for the next allocation, in the whole process; whether it will.

    By default it returns large blocks to the system, so that every training step is given its activations and gradients
    again page by page, zeroed. The process then stays as large as it has been at its peak. No effect on tensors.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_THRESHOLD, 1 << 30) and mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1))
