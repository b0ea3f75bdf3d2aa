"""Print one of the two commands of the README, so that what runs here is what a reader runs."""

import re
import sys
from pathlib import Path

name = sys.argv[1]
readme = Path(__file__).resolve().parent.parent.joinpath("README.md").read_text()
found = re.search(rf"<!-- command: {re.escape(name)} -->\s*```bash\n(.*?)```", readme, re.DOTALL)
if not found:
    sys.exit(f"README.md has no ```bash block after <!-- command: {name} -->")
print(found[1].strip())
