"""Output that nobody reads any more, as behind `| head`."""

from __future__ import annotations

import os
import select
import sys

__all__ = ["nobody_reads"]


def nobody_reads() -> bool:
    """Whether the standard output leads nowhere; it is silent from then on."""
    try:
        output, poll = sys.stdout.fileno(), select.poll()
    except OSError:  # it is no file
        return False
    poll.register(output, 0)
    if not poll.poll(0):  # errors are told unasked
        return False
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, output)
    os.close(nowhere)
    return True
