"""The tile shapes to choose from, and which of them fit a weight. A shape is listed because it compiles without spills.

`benchmarks/results/gpu_aot.md` holds registers, spills and shared memory of every one on sm_80, sm_90 and sm_100.
"""

from __future__ import annotations

from typing import NamedTuple

from .index import Weight

MOST_STAGES = 6


class Tile(NamedTuple):
    """One program's share of the output, and how it runs.

    bm        pixels; for the gradient of the values, pixels of one trip of the loop
    bn        output channels: a multiple of 16, several blocks when the blocks are lower
    bk        gathered channels of one trip, at most; for the gradient of the values, of the whole program
    swapped   weights on the left of the product: 64 channels fill a wgmma that 64 channels on the right half fill
    group     pixel tiles that go through all channels before the next ones: they share x in L2
    since     compute capability from which it fits the registers (wgmma and tcgen05 read operands from shared memory)
    splits    programs that share one tile's walk, summed afterwards; for when there are fewer tiles than processors
    """

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int
    swapped: bool = False
    since: int = 80
    group: int = 8
    splits: int = 1

    @property
    def halved(self) -> bool:
        """Whether the end of a gather runs in two halves: 128 sums of a thread leave no registers for what is added."""
        return self.bm * self.bn >= 128 * 32 * self.warps

    def stages_at(self, depth: int) -> int:
        """Stages of a gather whose trips are ``depth`` channels: shallow ones take less memory, and need more ahead."""
        return min(self.stages * max(self.bk // depth, 1), MOST_STAGES)

    def __str__(self) -> str:
        swapped = " swapped" if self.swapped else ""
        return f"{self.bm}x{self.bn}x{self.bk} w{self.warps} s{self.stages}{swapped}"


# float16 and bfloat16, widest first:
GATHER_HALF = (
    Tile(128, 256, 64, 8, 3, since=90),
    Tile(128, 128, 64, 4, 3, since=90),  # two of them share a processor: one begins or ends while the other multiplies
    Tile(128, 128, 64, 8, 3),
    Tile(256, 64, 64, 8, 3, swapped=True, since=90),
    Tile(64, 128, 64, 4, 4),
    Tile(128, 64, 64, 8, 4),
    Tile(64, 64, 64, 8, 4),
    Tile(64, 32, 64, 4, 4),
    Tile(64, 16, 64, 4, 4),
)
# float32 in tf32: half the channels of a trip in the same bytes.
GATHER_TF32 = (
    Tile(128, 128, 32, 8, 3),
    Tile(128, 64, 32, 4, 3),
    Tile(64, 32, 32, 4, 3),
    Tile(64, 16, 32, 4, 3),
)
# float32 without tensor cores: as many sums as registers hold; with four warps the second one spills.
GATHER_IEEE = (Tile(64, 64, 16, 4, 3), Tile(64, 32, 16, 8, 3), Tile(32, 16, 16, 4, 2))

PRODUCTS_HALF = (
    Tile(64, 256, 128, 8, 3, since=90),
    Tile(64, 128, 128, 8, 3),
    Tile(64, 128, 64, 8, 3),
    Tile(64, 64, 128, 8, 3),
    Tile(64, 64, 64, 4, 3),
    Tile(64, 64, 32, 4, 3),
    Tile(64, 32, 64, 4, 3),
    Tile(64, 32, 32, 4, 3),
    Tile(64, 16, 32, 4, 3),
    Tile(64, 16, 16, 4, 3),
)
PRODUCTS_TF32 = (Tile(32, 64, 64, 4, 3), Tile(32, 32, 32, 4, 3), Tile(32, 16, 16, 4, 3))
PRODUCTS_IEEE = (Tile(16, 64, 64, 8, 2), Tile(16, 32, 32, 4, 2), Tile(16, 16, 16, 4, 2))

FAMILIES = {
    ("gather", "half"): GATHER_HALF,
    ("gather", "tf32"): GATHER_TF32,
    ("gather", "ieee"): GATHER_IEEE,
    ("products", "half"): PRODUCTS_HALF,
    ("products", "tf32"): PRODUCTS_TF32,
    ("products", "ieee"): PRODUCTS_IEEE,
}
DIRECTIONS = ("forward", "grad_input", "grad_values")


def family(dtype_name: str, tf32: bool) -> str | None:
    """Which tiles a dtype takes: "half", "tf32", "ieee", or None where there is no kernel."""
    if dtype_name in ("float16", "bfloat16"):
        return "half"
    return ("tf32" if tf32 else "ieee") if dtype_name == "float32" else None


def why_not(weight: Weight) -> str | None:
    """Why the kernels refuse a weight, or None. They copy 16 bytes at a time and multiply 16 channels at a time."""
    if weight.bh % 16 or weight.bw % 16:
        return (
            f"blocks of {weight.bh}x{weight.bw}: the tensor-core kernels take heights and widths that are multiples "
            "of 16; prune with BlockPattern.for_device('cuda')"
        )
    per_group = weight.rows // weight.groups
    if weight.cols % 8 or per_group % 8:
        return (
            f"{weight.cols} input and {per_group} output channels a group: the tensor-core kernels take multiples of "
            "8; pad the layer or leave it dense"
        )
    return None


def candidates(direction: str, family: str, weight: Weight, capability: int) -> list[Tile]:
    """The tiles that may run a weight on a device, widest first: none wider than its conv group rounded up."""
    channels = weight.cols if direction == "grad_input" else weight.rows // weight.groups
    kind = "products" if direction == "grad_values" else "gather"
    widest = max(16, 1 << max(channels - 1, 0).bit_length())
    fitting = [tile for tile in FAMILIES[kind, family] if tile.bn <= widest and tile.since <= capability]
    if kind == "products":
        deepest = max(16, 1 << (weight.kernel[0] * weight.kernel[1] * weight.cols - 1).bit_length())
        fitting = [tile for tile in fitting if tile.bk <= deepest]
    return fitting
