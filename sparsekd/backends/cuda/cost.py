"""What a tile should take, from bytes, multiplications and waves: the planner's guess where nothing was measured.

Model of one Hopper processor and clock, per 16 reduced channels of a ``left x right`` tile: the tensor cores need
``left * right / 128`` cycles (4096 FLOP a clock in 16-bit types); shared memory, 128 bytes a clock, is read ``left /
64`` times (64 rows of the left, and all of the right) and written once; four schedulers issue what a trip of the loop
holds. The slowest counts. L2 feeds all processors together. Nothing here was fitted to a measurement of these kernels.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch

from sparsekd.kernels.index import StepTable
from sparsekd.kernels.tiles import Tile

from .plan import Problem


class Device(NamedTuple):
    """What the model needs to know of a GPU. ``flops`` is the dense 16-bit peak of the tensor cores."""

    name: str
    processors: int
    flops: float
    bytes_per_second: float
    l2_bytes_per_second: float
    shared_bytes: int
    capability: int


# Sources: vendor datasheets; the rate of L2 is an estimate.
DEVICES = {
    "NVIDIA H200": Device("NVIDIA H200", 132, 989e12, 4.8e12, 9e12, 232448, 90),
    "NVIDIA H100 80GB HBM3": Device("NVIDIA H100 80GB HBM3", 132, 989e12, 3.35e12, 9e12, 232448, 90),
    "NVIDIA A100-SXM4-80GB": Device("NVIDIA A100-SXM4-80GB", 108, 312e12, 2.0e12, 5e12, 166912, 80),
}
DENSE_SHARE = 0.65  # of the peak that dense convolution libraries are taken to reach
KERNEL_SHARE = 0.84  # of its own cap that the loop of a tile is taken to reach
# Before its loop a program reads three dependent numbers and fills its stages, behind it it stores: 2 to 3 thousand
# cycles at 1.755 GHz, in which a processor does nothing else unless a second program has room on it.
PROGRAM_SECONDS = 2500 / 1.755e9
REGISTERS = 65536  # of a processor
# Instructions of a warp in one trip of the loop, and for each 16 bytes that a thread copies in it: read off the sm_90
# code of seven 16-bit tiles, 123 to 203 a trip of a gather, 314 to 397 of the products.
TRIP_INSTRUCTIONS = {"forward": (89, 8.6), "grad_input": (80, 8.6), "grad_values": (163, 19.5)}
BYTES_SHARE = 0.85  # of the memory bandwidth
LAUNCH = 4e-6  # seconds from one kernel to the next
FAMILY_RATE = {"half": 1.0, "tf32": 0.5, "ieee": 67 / 989}  # of the 16-bit peak
ELEMENT_BYTES = {"half": 2, "tf32": 4, "ieee": 4}
MOST_PARTS = 32
TRIPS_OF_A_PART = 4  # at least: below, filling the pipeline and adding the parts cost more than they save
NO_GROUPS = 1 << 20


@lru_cache(maxsize=16)
def of_device(device: torch.device) -> Device:
    """A device's own figures where torch knows them, with the rates of the nearest one in ``DEVICES``."""
    if device.type != "cuda":  # interpreted
        return DEVICES["NVIDIA H200"]
    found = torch.cuda.get_device_properties(device)
    known = DEVICES.get(found.name, DEVICES["NVIDIA H100 80GB HBM3"])
    return known._replace(
        name=found.name,
        processors=found.multi_processor_count,
        flops=known.flops * found.multi_processor_count / known.processors,
        shared_bytes=getattr(found, "shared_memory_per_block_optin", 101376),
        capability=10 * found.major + found.minor,
    )


class Work(NamedTuple):
    """One call: programs, multiplications and additions of all of them (zeros included), bytes that must move, and the
    reduced channels of a trip."""

    programs: int
    flops: float
    bytes: float
    depth: int


def sums(direction: str, tile: Tile) -> tuple[int, int, int]:
    """The product one program makes: (left, right, depth of a trip)."""
    if direction == "grad_values":
        return tile.bn, tile.bk, tile.bm
    return (tile.bn, tile.bm, tile.bk) if tile.swapped else (tile.bm, tile.bn, tile.bk)


def cap(direction: str, tile: Tile, device: Device, depth: int | None = None) -> float:
    """The share of the tensor-core peak that shared memory, L2 and the schedulers let a tile of 16-bit operands reach.

    depth: reduced channels of a trip, where the blocks are narrower than the tile allows.
    """
    left, right, deepest = sums(direction, tile)
    trip = depth or deepest
    lefts = -(-left // 64)  # a wgmma takes 64 rows on the left, also where there are fewer
    compute = lefts * right / 2
    shared = lefts * (16 + right / 4) + (left + right) / 4
    l2 = left * right / (left + right) * device.l2_bytes_per_second / device.flops
    base, each = TRIP_INSTRUCTIONS[direction]
    copies = (left + right) * trip * 2 / 16 / (32 * tile.warps)
    issue = (base + each * copies) * tile.warps / 4 / (trip / 16)
    return min(left * right / 128 / max(compute, shared, issue), l2)


def shared_bytes(direction: str, tile: Tile, element_bytes: int) -> int:
    """Shared memory of a tile: the stages of both operands, and a little for its other uses."""
    left, right, depth = sums(direction, tile)
    return tile.stages * (left + right) * depth * element_bytes + 1024


def seconds(problem: Problem, work: Work, tile: Tile, device: Device) -> float:
    """Predicted seconds of one call of our kernel: its trips, and for each program what is not a trip."""
    rate = device.flops * FAMILY_RATE[problem.family] * cap(problem.direction, tile, device, work.depth) * KERNEL_SHARE
    programs = max(work.programs * tile.splits, 1)
    idle = 1 / _filled(programs, device.processors)
    alone = min(resident(problem.direction, tile, device), -(-programs // device.processors))
    besides = programs / device.processors * PROGRAM_SECONDS / alone
    moved = work.bytes / (device.bytes_per_second * BYTES_SHARE)
    return max((work.flops / rate + besides) * idle, moved) + LAUNCH * (2 if tile.splits > 1 else 1)


def resident(direction: str, tile: Tile, device: Device) -> int:
    """How many programs share a processor, by shared memory and by registers: the sums, and about 96 a thread more."""
    left, right, _ = sums(direction, tile)
    threads = 32 * tile.warps
    registers = threads * (96 + left * right // threads)
    return max(min(device.shared_bytes // shared_bytes(direction, tile, 2), REGISTERS // registers), 1)


def _filled(programs: int, processors: int) -> float:
    """The share of the processors at work, on average over the waves; many waves fill each other's gaps."""
    waves = -(-programs // processors)
    return programs / (waves * processors) if waves <= 4 else 1.0


def dense_seconds(flops: float, moved_bytes: float, family: str, device: Device) -> float:
    """Predicted seconds of the dense library, the weight already dense."""
    compute = flops / (device.flops * FAMILY_RATE[family] * DENSE_SHARE)
    return max(compute, moved_bytes / (device.bytes_per_second * BYTES_SHARE)) + LAUNCH


def dense_flops(problem: Problem) -> float:
    """Multiplications and additions of the dense layer, in any direction."""
    weight = problem.weight
    return 2.0 * _pixels(problem) * weight.rows * weight.cols * math.prod(weight.kernel)


def moved_bytes(problem: Problem) -> float:
    """Bytes of the activations on both sides; the weight is left out."""
    weight, steps = problem.weight, math.prod(problem.weight.stride)
    channels = weight.cols * weight.groups * steps + weight.rows
    return float(_pixels(problem) * channels * ELEMENT_BYTES[problem.family])


def _pixels(problem: Problem) -> int:
    """Output pixels of the layer (``image`` is that of the tensor written, or of the grad it is multiplied with)."""
    height, width = problem.image
    if problem.direction == "grad_input":
        height, width = (-(-n // s) for n, s in zip(problem.image, problem.weight.stride, strict=True))
    return problem.images * height * width


def arrange(problem: Problem, tile: Tile, table: StepTable, device: Device) -> tuple[Tile, Work]:
    """The tile with its parts and order for this problem, and the work that it makes."""
    pixel_tiles = max(-(-_pixels(problem) // tile.bm), 1)
    left, right, depth = sums(problem.direction, tile)
    if problem.direction == "grad_values":
        programs, walk, trips = table.num_steps, pixel_tiles, table.num_steps * pixel_tiles
    else:
        programs, walk = pixel_tiles * table.num_tiles, table.num_steps // max(table.num_tiles, 1)
        depth, trips = table.slot, pixel_tiles * table.num_steps
    most = min(MOST_PARTS, walk // TRIPS_OF_A_PART)
    splits = 1
    if programs < 2 * device.processors:  # the fewest parts that fill the device best
        filled = {parts: round(_filled(programs * parts, device.processors), 2) for parts in range(1, most + 1)}
        splits = max(filled, key=lambda parts: (filled[parts], -parts), default=1)
    # With few tiles the longest must start first; with many, those that share pixels belong together.
    group = NO_GROUPS if programs < 4 * device.processors else tile.group
    work = Work(programs, 2.0 * left * right * depth * trips, moved_bytes(problem), depth)
    return tile._replace(splits=splits, group=group), work
