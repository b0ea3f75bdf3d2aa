"""The pictures that `benchmarks.equal_latency` trains on."""

from __future__ import annotations

import lzma
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsekd import data
from sparsekd.data import Rows
from sparsekd.runs.plans.images import PROTOCOLS

REDUCED = PROTOCOLS["reduced"]


@dataclass(frozen=True)
class Pictures:
    """Square pictures of three channels. load(folder) -> (train, test)."""

    title: str
    pixels: int
    classes: int
    load: Callable[[Path], tuple[Rows, Rows]]

    def example(self, batch: int) -> Tensor:
        """``[batch, 3, pixels, pixels]``, channels_last, to time a network with."""
        return torch.randn(batch, 3, self.pixels, self.pixels).contiguous(memory_format=torch.channels_last)

    def first(self, rows: Rows, images: int) -> Rows:
        """The first rows of each class, as many of each."""
        labels, each = rows.target.numpy(), images // self.classes
        kept = [np.flatnonzero(labels == label)[:each] for label in range(self.classes)]
        return rows.take(np.sort(np.concatenate(kept)))


def fashion_mnist(folder: Path) -> tuple[Rows, Rows]:
    train, test = (
        Rows(
            (torch.tensor(_read_idx(folder / f"{name}-images-idx3-ubyte")),),
            torch.tensor(_read_idx(folder / f"{name}-labels-idx1-ubyte"), dtype=torch.int64),
            None,
            prepare=prepared,
        )
        for name in ("train", "t10k")
    )
    return train, test


def cifar100_reduced(folder: Path) -> tuple[Rows, Rows]:
    """As in `sparsekd run cifar100 --protocol reduced`, but all training images of these classes."""
    sizes: Any = {"validation": REDUCED.validation, "pixels": REDUCED.pixels, "classes": REDUCED.classes}
    task = data.load("cifar100", folder, **sizes)
    return task.train, task.test


DATASETS = {
    "fashion-mnist": Pictures("Fashion-MNIST", 28, 10, fashion_mnist),
    "cifar100-reduced": Pictures(
        f"CIFAR-100 of {REDUCED.classes} classes and {REDUCED.pixels} x {REDUCED.pixels} pixels",
        REDUCED.pixels,
        REDUCED.classes,
        cifar100_reduced,
    ),
}


def prepared(images: tuple[Tensor, ...], generator: torch.Generator | None) -> tuple[Tensor, ...]:
    """Bytes [N, 28, 28] -> [N, 3, 28, 28] of mean 0 and variance 1, mirrored at random in training."""
    (x,) = images
    x = (x.float() / 255 - 0.286) / 0.353
    if generator is not None:
        mirrored = torch.rand(len(x), generator=generator) < 0.5
        x = torch.where(mirrored[:, None, None], x.flip(2), x)
    return (x[:, None].expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last),)


def _read_idx(path: Path) -> np.ndarray:
    """The array of an idx file, plain or in xz."""
    for file in (path, path.with_name(path.name + ".xz")):
        if file.is_file():
            raw = file.read_bytes()
            content = lzma.decompress(raw) if file.suffix == ".xz" else raw
            dims = struct.unpack(f">{content[3]}I", content[4 : 4 + 4 * content[3]])
            return np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(dims)
    raise FileNotFoundError(f"benchmarks.equal_latency: {path} does not exist, nor with .xz; --data names its folder")
