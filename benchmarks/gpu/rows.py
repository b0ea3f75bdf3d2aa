"""Rows that survive being cut off: a JSON line each, on the disk the moment it is measured."""

from __future__ import annotations

import json
import os
from collections.abc import Hashable
from pathlib import Path
from typing import Any


class Rows:
    """The rows of a step; those of an earlier run are there already, and need not be measured again."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.rows: list[dict[str, Any]] = []
        text = self.path.read_text() if self.path.exists() else ""
        whole = text[: text.rfind("\n") + 1]  # a line without its end was cut off while it was written
        if whole != text:
            self.path.write_text(whole)
        for line in whole.splitlines():
            self.rows.append(json.loads(line))
        self._keys = {_key(row["key"]) for row in self.rows}

    def __contains__(self, key: Hashable) -> bool:
        return _key(key) in self._keys

    def add(self, key: Hashable, row: dict[str, Any]) -> None:
        row = {"key": key, **row}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.rows.append(row)
        self._keys.add(_key(key))


def _key(key: Hashable) -> str:
    return json.dumps(key)
