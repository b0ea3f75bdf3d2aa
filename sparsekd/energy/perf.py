"""The one system call behind `perf` energy events, without the perf tool."""

from __future__ import annotations

import ctypes
import os
import platform
import sys

# The energy events exist on x86 alone.
_SYSCALL = {"x86_64": 298, "i686": 336, "i386": 336}
_FLAG_FD_CLOEXEC = 8


class _Attr(ctypes.Structure):
    """The head of struct perf_event_attr (linux/perf_event.h): its first published size, the rest being zero."""

    _fields_ = (
        ("type", ctypes.c_uint32),
        ("size", ctypes.c_uint32),
        ("config", ctypes.c_uint64),
        ("unused", ctypes.c_uint64 * 6),
    )


def perf_event_open(kind: int, config: int, cpu: int) -> int:
    """Open event `config` of the PMU number `kind`, counting everything that runs on `cpu`.

    Returns a file descriptor whose reads give the 64-bit count. Raises OSError with the kernel's errno, and
    FileNotFoundError where there is no such system call. Source: man 2 perf_event_open.
    """
    machine = platform.machine()
    number = _SYSCALL.get(machine)
    if not sys.platform.startswith("linux") or number is None:
        raise FileNotFoundError(f"no perf energy events on {sys.platform} {machine}")
    libc = ctypes.CDLL(None, use_errno=True)
    attr = _Attr(type=kind, size=ctypes.sizeof(_Attr), config=config)
    fd: int = libc.syscall(
        ctypes.c_long(number),
        ctypes.byref(attr),
        ctypes.c_int(-1),  # every process
        ctypes.c_int(cpu),
        ctypes.c_int(-1),  # no group
        ctypes.c_ulong(_FLAG_FD_CLOEXEC),
    )
    if fd < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return fd
