"""The compiled module, or why there is none."""

from __future__ import annotations

from typing import Any

import torch  # noqa: F401 (before _C: its OpenMP run time is the one the kernels then share)

native: Any
try:
    from .. import _C as native

    missing = ""
except ImportError as error:
    native, missing = None, f"sparsekd._C is not importable ({error}); pip install sparsekd builds it"
