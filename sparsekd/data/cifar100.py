"""CIFAR-100: 50 000 + 10 000 images of 32x32 pixels in 100 classes, read from the user's own copy.

A. Krizhevsky: Learning Multiple Layers of Features from Tiny Images, 2009. https://www.cs.toronto.edu/~kriz/cifar.html
states no licence, so it does not ship with sparsekd. Both distributions are read: the binary version (records of coarse
label, fine label and 3072 bytes) and the python version, whose pickles are opened by an unpickler that can build numpy
arrays and nothing else.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..goals import Classification
from . import sources
from .parts import Rows
from .task import Task

CLASSES, PIXELS = 100, 32
IMAGES = {"train": 50_000, "test": 10_000}  # what the official file of each part holds
_RECORD = 2 + 3 * PIXELS**2


def load(
    root: Path | None,
    *,
    validation: int = 5_000,
    images: int | None = None,
    test: int | None = None,
    pixels: int = PIXELS,
    classes: int = CLASSES,
) -> Task[Rows]:
    """Read train and test of either distribution from `root`.

    Args:
        root: the folder of the files.
        validation: training images held out, equally many of each class, always the same ones.
        images: training images to use of the others, equally many of each class; None: all.
        test: test images to use, equally many of each class; None: all.
        pixels: 32, or 16 or 8: images averaged over squares of pixels.
        classes: how many of the 100, the first by label; images of the others are left out of all parts.
    """
    (train, labels, name, digest), (unseen, unseen_labels, test_name, test_digest) = (
        _read(root, part) for part in ("train", "test")
    )
    if not 1 < classes <= CLASSES:
        raise ValueError(f"sparsekd.data.load('cifar100'): classes must lie in 2..{CLASSES}, got {classes}")
    held_out, rest = _drawn(labels, classes, {"validation": validation, "images": images})
    (tested,) = _drawn(unseen_labels, classes, {"test": test})
    prepare = Images.like(train[rest], pixels)

    def split(pictures: np.ndarray, target: np.ndarray) -> Rows:
        return Rows((_shrunk(pictures, pixels),), torch.from_numpy(target), None, prepare=prepare)

    return Task(
        name="cifar100",
        train=split(train[rest], labels[rest]),
        val=split(train[held_out], labels[held_out]),
        test=split(unseen[tested], unseen_labels[tested]),
        goal=Classification(),
        sizes={"classes": classes, "pixels": pixels},
        mean=0.0,
        split=f"official train and test; {validation} train images, equally many of each class, held out",
        meta={
            "sha256": {name: digest, test_name: test_digest},
            "counts": {"train": len(rest), "val": len(held_out), "test": len(tested)},
            "pixels": pixels,
            "identical_images": _identical(train, unseen),
        },
    )


@dataclass(frozen=True)
class Images:
    """Bytes [B, 3, H, W] -> standardised float32 images, channels_last; with a generator cropped and flipped.

    The random crop moves an image by up to `padding` pixels each way, black beyond its edge; half of the images are
    mirrored. One gather for the whole batch on the device that holds it; the draws come from the (CPU) generator.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    padding: int = 4

    @classmethod
    def like(cls, pictures: np.ndarray, pixels: int) -> Images:
        """Mean and deviation of each channel of these pictures; the padding is an eighth of the side."""
        counts = np.stack([np.bincount(pictures[:, channel].reshape(-1), minlength=256) for channel in range(3)])
        values = np.arange(256) / 255
        mean = counts @ values / counts.sum(1)
        std = np.sqrt(counts @ values**2 / counts.sum(1) - mean**2)
        return cls(tuple(mean.tolist()), tuple(std.tolist()), pixels // 8)

    def __call__(self, inputs: tuple[Tensor, ...], generator: torch.Generator | None = None) -> tuple[Tensor, ...]:
        if generator is not None:
            return self.apply(inputs, self.draw(len(inputs[0]), generator))
        return self._standardised(inputs[0])

    def draw(self, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """For each row the corner of its crop, int64 [B, 2] (row, column), and whether it is mirrored, bool [B]."""
        corner = torch.randint(2 * self.padding + 1, (2, rows, 1), generator=generator)
        mirrored = torch.rand(rows, 1, generator=generator) < 0.5
        return corner[..., 0].T, mirrored[:, 0]

    def apply(self, inputs: tuple[Tensor, ...], drawn: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (x,), (corner, mirrored) = inputs, drawn
        channels, height, width = x.shape[1:]
        corner, mirrored = corner.cpu(), mirrored.cpu()[:, None]
        rows, columns = corner[:, :1] + torch.arange(height), corner[:, 1:] + torch.arange(width)  # [B, H], [B, W]
        columns = torch.where(mirrored, columns.flip(1), columns)
        places = (rows[:, :, None] * (width + 2 * self.padding) + columns[:, None, :]).to(x.device)  # [B, H, W]
        padded = F.pad(x, (self.padding,) * 4).flatten(2)
        return self._standardised(padded.gather(2, places.flatten(1)[:, None].expand(-1, channels, -1)).view(x.shape))

    def _standardised(self, x: Tensor) -> tuple[Tensor, ...]:
        mean, std = (x.new_tensor(values, dtype=torch.float32)[:, None, None] for values in (self.mean, self.std))
        x = (x.float() / 255 - mean) / std
        return (x.contiguous(memory_format=torch.channels_last),)


def _read(root: Path | None, part: str) -> tuple[np.ndarray, np.ndarray, str, str]:
    """Images uint8 [N, 3, 32, 32], fine labels int64 [N], and name and sha256 of the file of one part."""
    path = _find(root, part)
    data = path.read_bytes()
    pictures, labels = _binary(path.name, data) if path.suffix == ".bin" else _python(path.name, data)
    wrong = np.flatnonzero((labels < 0) | (labels >= CLASSES))
    if len(wrong):
        raise ValueError(
            f"sparsekd.data: {path.name} image {wrong[0]}: the label must lie in 0..99, got {labels[wrong[0]]}; "
            "fetch the file again"
        )
    if len(labels) != IMAGES[part]:
        raise ValueError(
            f"sparsekd.data: {path.name} must hold the {IMAGES[part]} images of the official {part} part, "
            f"got {len(labels)}; fetch the file again"
        )
    return pictures.reshape(-1, 3, PIXELS, PIXELS), labels.astype(np.int64), path.name, sources.sha256(data)


def _find(root: Path | None, part: str) -> Path:
    try:
        return sources.find("cifar100", root, "cifar-100-binary", (f"{part}.bin",))
    except FileNotFoundError as error:
        try:
            return sources.find("cifar100", root, "cifar-100-python", (part,))
        except FileNotFoundError:
            raise error from None


def _binary(name: str, data: bytes) -> tuple[np.ndarray, np.ndarray]:
    if not data or len(data) % _RECORD:
        raise ValueError(
            f"sparsekd.data: {name} must hold records of {_RECORD} bytes, got {len(data)} bytes; fetch the file again"
        )
    records = np.frombuffer(data, np.uint8).reshape(-1, _RECORD)
    return np.ascontiguousarray(records[:, 2:]), records[:, 1]


def _python(name: str, data: bytes) -> tuple[np.ndarray, np.ndarray]:
    try:
        content = _Unpickler(io.BytesIO(data), encoding="bytes").load()
        fields = {key.decode() if isinstance(key, bytes) else key: value for key, value in content.items()}
        pictures, labels = fields["data"], np.asarray(fields["fine_labels"])
        if pictures.dtype != np.uint8 or pictures.shape != (len(labels), _RECORD - 2) or labels.dtype.kind != "i":
            raise ValueError(f"data {pictures.dtype} {pictures.shape} and fine_labels {labels.dtype} {labels.shape}")
    # A pickle is a program: a broken one can raise nearly any exception, not only UnpicklingError.
    except Exception as error:
        raise ValueError(
            f"sparsekd.data: {name} must be a pickled dict of data uint8 [N, 3072] and fine_labels, got "
            f"{type(error).__name__}: {error}; fetch the python version of CIFAR-100 again"
        ) from error
    return np.ascontiguousarray(pictures), labels


class _Unpickler(pickle.Unpickler):
    """Builds dicts, lists, numbers, strings and numpy arrays: a file cannot make it call anything else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return _reconstruct
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _reconstruct(kind: type, shape: tuple[int, ...], dtype: bytes) -> np.ndarray:
    """An array that the pickle then fills: what numpy's function of this name does."""
    if kind is not np.ndarray:
        raise pickle.UnpicklingError(f"it asks for an array of kind {kind!r}")
    return np.ndarray.__new__(np.ndarray, shape, np.dtype("b"))


def _drawn(labels: np.ndarray, classes: int, counts: dict[str, int | None]) -> list[np.ndarray]:
    """Rows of parts of these sizes that do not overlap, each in order, with equally many of each of the classes.

    They are cut one after the other from a fixed random order; None takes all that is left.
    """
    order = np.random.default_rng(0).permutation(len(labels))
    by_class = [order[labels[order] == label] for label in range(classes)]
    parts, begin = [], 0
    for name, count in counts.items():
        if count is not None and (count < classes or count % classes):
            raise ValueError(f"sparsekd.data.load('cifar100'): {name} must be a multiple of {classes}, got {count}")
        end = None if count is None else begin + count // classes
        smallest = min(map(len, by_class))
        if smallest < (begin + 1 if end is None else end):
            raise ValueError(
                f"sparsekd.data.load('cifar100'): {name}: a class has {smallest} images, {begin} of them are held out "
                f"already, and {'more' if end is None else end - begin} are asked for; ask for fewer"
            )
        parts.append(np.sort(np.concatenate([rows[begin:end] for rows in by_class])))
        begin = end or 0
    return parts


def _shrunk(pictures: np.ndarray, pixels: int) -> Tensor:
    if pixels not in (PIXELS, PIXELS // 2, PIXELS // 4):
        raise ValueError(f"sparsekd.data.load('cifar100'): pixels must be 32, 16 or 8, got {pixels}")
    x = torch.from_numpy(pictures)
    return x if pixels == PIXELS else torch.cat([_averaged(part, PIXELS // pixels) for part in x.split(4096)])


def _averaged(x: Tensor, side: int) -> Tensor:
    return F.avg_pool2d(x.float(), side).round().to(torch.uint8)


def _identical(train: np.ndarray, test: np.ndarray) -> str:
    """How many images the data set holds more than once: the test part is not quite unseen."""
    places: dict[bytes, set[str]] = defaultdict(set)
    seen: dict[bytes, int] = defaultdict(int)
    for part, pictures in (("train", train), ("test", test)):
        for picture in pictures:
            key = hashlib.blake2b(picture.tobytes()).digest()
            places[key].add(part)
            seen[key] += 1
    groups = [key for key, count in seen.items() if count > 1]
    across = sum(len(places[key]) > 1 for key in groups)
    return f"{len(groups)} groups of identical images, {across} of them across train and test (kept as they are)"
