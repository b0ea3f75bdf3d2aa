"""What `torch.compile` calls of a function that no graph can hold: the function as it is.

Import this where it is needed and not before: it imports torch._dynamo, seconds that most processes can save.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch


@torch.compiler.disable
def run(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    return function(*args, **kwargs)
