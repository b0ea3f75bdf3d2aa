"""Print the pinned requirement of a tool from pyproject's ``dev`` extra: one place holds the versions."""

import re
import sys
from pathlib import Path

name = sys.argv[1]
pyproject = Path(__file__).resolve().parent.parent.joinpath("pyproject.toml").read_text()
found = re.search(rf'"({re.escape(name)}==[^"]+)"', pyproject)
if not found:
    sys.exit(f"pyproject.toml pins no {name}")
print(found[1])
