"""A dictionary of bounded size for what is soon known again."""

from __future__ import annotations

from typing import Any


class Recent(dict[Any, Any]):
    """Forgets everything when it is full: whatever is still asked for is soon there again."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    def __setitem__(self, key: Any, value: Any) -> None:
        if len(self) >= self._most and key not in self:
            self.clear()
        super().__setitem__(key, value)
