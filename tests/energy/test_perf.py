"""The system call itself."""

import os
import time

import pytest

from sparsekd.energy.perf import perf_event_open


def test_the_real_system_call_counts():
    """The software event cpu-clock (type 1, config 0) counts nanoseconds of CPU 0 on any Linux that allows it."""
    try:
        fd = perf_event_open(1, 0, 0)
    except OSError as error:
        pytest.skip(f"perf_event_open: {error}")
    try:
        first = int.from_bytes(os.read(fd, 8), "little")
        time.sleep(0.05)
        nanoseconds = int.from_bytes(os.read(fd, 8), "little") - first
    finally:
        os.close(fd)
    assert 0.04e9 < nanoseconds < 5e9


def test_the_real_system_call_reports_errno():
    with pytest.raises(OSError):
        perf_event_open(2**31, 0, 0)
