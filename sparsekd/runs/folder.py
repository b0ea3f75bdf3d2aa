"""The folder of a run, which one process at a time works in.

Two runs in one folder would both train everything and overwrite each other's files. What a killed run left half written
is swept, and a file is written before anything is trained: a full disk is told now, not after the first epoch.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ..checkpoint import sweep, write_atomically

LOCK, OWNER = ".sparsekd.lock", ".sparsekd.owner"


@contextmanager
def claimed(out: Path) -> Iterator[None]:
    """`out`, made where it is not there, for this process alone.

    Raises RuntimeError where another process works in it, OSError where it cannot be written to.
    """
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise RuntimeError(
            f"sparsekd run: {out} is in use by {_owner(out)}; wait for it, stop it, or give another --out"
        ) from None
    try:
        for folder in (out, *out.glob("*/"), *out.glob("seed*/*/")):
            sweep(folder)
        about = {"pid": os.getpid(), "host": platform.node(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
        write_atomically(out / OWNER, json.dumps(about).encode())
        yield
    finally:
        for name in (OWNER, LOCK):  # whoever has opened this lock in between sees that it is gone, and makes a new one
            (out / name).unlink(missing_ok=True)
        lock.release()


def _owner(out: Path) -> str:
    """Who says to hold the folder; it may have taken it, and not said so yet."""
    try:
        about = json.loads((out / OWNER).read_text())
        return f"process {about['pid']} on {about['host']}, since {about['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process, which has not yet said which"
