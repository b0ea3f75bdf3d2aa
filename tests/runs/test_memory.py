"""Freed memory stays with the process: page faults of a second allocation, counted in processes of their own."""

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
from sparsekd.runs.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(10 << 20) for _ in range(4)]  # 40 MiB: above 32 glibc always gives it back
    del tensors
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_freed_memory_is_not_faulted_in_again():
    faults = {
        how: int(subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, check=True).stdout)
        for how in ("default", "keep")
    }
    pages = 4 * (40 << 20) // os.sysconf("SC_PAGE_SIZE")
    assert faults["keep"] < pages // 20, faults
    assert faults["default"] > pages // 2, f"glibc keeps it anyway: {faults}"
