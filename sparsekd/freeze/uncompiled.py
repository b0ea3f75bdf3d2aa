"""What `torch.compile` calls of a frozen network: the network as it is, for there is nothing in it to compile."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch


@torch.compiler.disable
def run(frozen: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    return frozen(*args, **kwargs)
