"""The command `sparsekd export`: a saved student becomes one file that runs without torch.

sparsekd export my.models:student --checkpoint student.safetensors --input-shape 3,32,32 --out student.skd
sparsekd export my.models:student --frozen student.frozen --out student.skd
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import checkpoint
from .bench import load
from .freeze import freeze, load_frozen


def export(
    name: str,
    out: str,
    *,
    frozen: str | None = None,
    weights: str | None = None,
    shapes: Sequence[Sequence[int]] = (),
    batch: int = 1,
    threads: int | None = None,
    dtype: str | None = None,
) -> str:
    """Write ``out``, and say what it holds.

    Args:
        name: "package.module:factory" of the model, called without arguments.
        frozen: a file of ``FrozenModel.save``; or
        weights: a file of ``checkpoint.save``; the model is frozen here, for this machine, with random inputs of
            ``shapes`` (without the batch) and ``dtype`` ("bf16" or None).

    Raises ValueError where neither or both files are given, the batch is no positive number, or a file cannot hold the
    network.
    """
    if (frozen is None) is (weights is None):
        raise ValueError("sparsekd export: expected either --frozen FILE or --checkpoint FILE")
    if batch < 1:
        raise ValueError(f"sparsekd export: the batch must be at least 1, got {batch}")
    model = load(name, "export").eval()
    if frozen is not None:
        network: Any = load_frozen(frozen, model, threads=threads)
    else:
        assert weights is not None
        if not shapes:
            raise ValueError("sparsekd export: --checkpoint needs --input-shape, once for each input, as in 3,224,224")
        inputs = [torch.randn(batch, *shape) for shape in shapes]
        network = freeze(checkpoint.load(model, weights), inputs, threads=threads, dtype=dtype)
    network.export(out)
    from .runtime import Session  # here, because it needs the compiled module

    return f"{Path(out)}: {Path(out).stat().st_size / 1e6:.2f} MB, {Session(out, threads=1)}"


__all__ = ["export"]
