"""CIFAR-100 with made-up pictures: few, but of every class, in the official format."""

from pathlib import Path

import numpy as np

PER_CLASS = {"train": 6, "test": 2}


def made_up(part: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N, 3072] and labels [N] of every class; test image 0 is train image 0."""
    random = np.random.default_rng(1)
    labels = random.permutation(np.repeat(np.arange(100), PER_CLASS[part]))
    images = random.integers(0, 256, (len(labels), 3072), dtype=np.uint8)
    images[:] = (images.astype(int) + 2 * labels[:, None]) // 3  # something to learn
    images[0] = 7
    return images, labels


def write(root: Path) -> Path:
    """Both parts in the binary version, in `root`."""
    (root / "cifar-100-binary").mkdir()
    for part in PER_CLASS:
        images, labels = made_up(part)
        records = np.concatenate([(labels[:, None] // 5), labels[:, None], images], axis=1).astype(np.uint8)
        (root / "cifar-100-binary" / f"{part}.bin").write_bytes(records.tobytes())
    return root
