"""What the processor of this machine is called, for every report that must name it.

It imports nothing of the package, so that `sparsekd doctor` can ask it where everything else is broken.
"""

from __future__ import annotations

import platform
import re
from pathlib import Path

__all__ = ["generation", "name"]

CPUINFO = Path("/proc/cpuinfo")  # Linux only; elsewhere the platform module answers


def name(cpuinfo: Path = CPUINFO) -> str:
    """As the maker wrote it ("AMD EPYC 9R14"), else what the operating system calls it; never empty."""
    found = re.search(r"^model name\s*:(.*)$", _text(cpuinfo), re.MULTILINE)
    return (found[1].strip() if found else "") or platform.processor() or platform.machine() or "unknown CPU"


def generation(cpuinfo: Path = CPUINFO) -> str:
    """Family and model ("family 25, model 17"): virtual machines give one name to several generations."""
    keys = "cpu family|model|CPU implementer|CPU part"
    found = dict(re.findall(rf"^({keys})\s*: (.*)$", _text(cpuinfo), re.MULTILINE))
    return ", ".join(f"{key.split()[-1]} {value}" for key, value in found.items()) or platform.machine()


def _text(cpuinfo: Path) -> str:
    try:
        return cpuinfo.read_text(errors="replace")
    except OSError:  # another system, or a container that hides it
        return ""
