"""Which path runs an op: a Triton tile, the dense library, or that on the channels that some block touches."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsekd.kernels import tiles as kernel_tiles
from sparsekd.kernels.index import Weight
from sparsekd.kernels.tiles import Tile

from ...blocks import BlockPattern, BlockSparse
from . import cost, driver, plan
from .device import is_capturing, on, refuse_capture
from .masks import Channels, Mask, masks
from .plan import COMPACT, DENSE, Choice, Measured, Plan, Problem

# Compiling a tile costs a second or more, once for each shape of block. The model is trusted no further than this.
MOST_TIMED, PROMISING = 3, 1.6


class Paths(NamedTuple):
    """The ways to run one op. Dense takes the channels to which it may keep, or None for all."""

    triton: Callable[[Tile], Tensor]
    dense: Callable[[Channels | None], Tensor]

    def run(self, choice: Choice, mask: Mask) -> Tensor:
        if choice.tile is not None:
            return self.triton(choice.tile)
        return self.dense(mask.channels if choice == COMPACT else None)


@lru_cache(maxsize=1)
def uses_triton() -> bool:
    """Whether the Triton kernels run; ``SPARSEKD_CUDA=native`` leaves them for the CUDA C++ ones, which need no JIT."""
    forced = os.environ.get("SPARSEKD_CUDA", "triton")
    if forced not in ("triton", "native"):
        raise RuntimeError(f"sparsekd: SPARSEKD_CUDA must be triton or native, got {forced!r}")
    return forced == "triton" and find_spec("triton") is not None


# ---- What no kernel takes


def takes(shape: Sequence[int], pattern: BlockPattern, groups: int = 1) -> bool:
    """Whether a layer ``[K, C / groups, ...]`` is worth these blocks: False where they suit the kernels, its channels
    do not. (Blocks for other devices run dense in any layer.)"""
    whole = Weight(pattern.bh, pattern.bw, pattern.bh, pattern.bw)
    layer = Weight(shape[0], shape[1], pattern.bh, pattern.bw, groups=groups)
    return kernel_tiles.why_not(whole) is not None or kernel_tiles.why_not(layer) is None


def refusal(values: Tensor, weight: Weight) -> str | None:
    """Why no kernel takes this weight, or None."""
    if kernel_tiles.family(dtype_name(values), False) is None:
        return f"{values.dtype}: the tensor-core kernels take float16, bfloat16 and float32"
    return kernel_tiles.why_not(weight)


def why_dense(blocks: BlockSparse, groups: int = 1) -> str | None:
    """Why the dense library runs the forward pass of a weight, or None."""
    why = refusal(blocks.values, Weight(*blocks.shape[:2], *blocks.values.shape[1:], groups=groups))
    if why is None and not uses_triton():
        why = driver.why_not(blocks.values.dtype, blocks.values.device)
    return why


def runs_dense(values: Tensor, weight: Weight, forward: bool = False) -> bool:
    """Whether the dense library alone runs this: what no kernel takes, and without Triton all but the forward pass of
    half types. The weight is made dense without a synchronisation, so a CUDA graph holds it, too."""
    if refusal(values, weight) is not None:
        return True
    return not uses_triton() and not (forward and driver.why_not(values.dtype, values.device) is None)


# ---- The choice


def run(
    direction: str, family: str, mask: Mask, values: Tensor, images: int, image: tuple[int, int], paths: Paths
) -> Tensor:
    """Run one op by the plan's choice; inside ``plan.measuring`` time the candidates first."""
    known = (direction, family, values.dtype, images, image)
    with on(values.device):
        choice = mask.choices.get(known)
        measuring = plan.is_measuring() and not is_capturing(values)
        if choice is None or measuring:
            problem = problem_of(direction, family, mask, values, images, image)
            of_device = plan_of(values.device)
            if measuring:
                choices = candidates(problem, mask, values)
                choice = of_device.measure(problem, choices, lambda one: paths.run(one, mask), values.device)
            else:
                choice = of_device.choose(problem, lambda: guess(problem, mask, values))
            mask.choices[known] = choice
            mask.ready.clear()  # each candidate left its launch there
        return paths.run(choice, mask)


def problem_of(direction: str, family: str, mask: Mask, values: Tensor, images: int, image: tuple[int, int]) -> Problem:
    structure = round(mask.density * 20) / 20, round(mask.fill[direction == "grad_input"], 1)
    return Problem(direction, dtype_name(values), family, images, image, mask.weight, *structure)


def candidates(problem: Problem, mask: Mask, values: Tensor) -> list[Choice]:
    """What is worth timing, dense first: of the tiles those that the model finds promising."""
    choices = [DENSE]
    if problem.weight.groups == 1:
        outputs, inputs = mask.channels
        if outputs.numel() and inputs.numel() and outputs.numel() + inputs.numel() < sum(mask.weight[:2]):
            choices.append(COMPACT)
    found = sorted(tiles(problem, mask, values), key=lambda pair: pair[1])
    promising = [tile for tile, seconds in found[:MOST_TIMED] if seconds <= PROMISING * found[0][1]]
    return choices + [Choice("triton", tile) for tile in promising]


def tiles(problem: Problem, mask: Mask, values: Tensor) -> list[tuple[Tile, float]]:
    """The tiles that fit this device, each cut into as many parts as fill it, with the model's seconds."""
    device, found = cost.of_device(values.device), []
    for tile in _fitting(problem, values):
        tile, work = cost.arrange(problem, tile, mask.table(problem.direction, tile), device)
        found.append((tile, cost.seconds(problem, work, tile, device)))
    return found


def _fitting(problem: Problem, values: Tensor) -> list[Tile]:
    device = cost.of_device(values.device)
    return [
        tile
        for tile in kernel_tiles.candidates(problem.direction, problem.family, problem.weight, device.capability)
        if cost.shared_bytes(problem.direction, tile, values.element_size()) <= device.shared_bytes
    ]


def guess(problem: Problem, mask: Mask, values: Tensor) -> Choice:
    """The candidate the cost model prefers."""
    refuse_capture(values)
    found = tiles(problem, mask, values)
    if not found or not mask.col_idx.shape[0]:
        return DENSE
    tile, ours = min(found, key=lambda pair: pair[1])
    device, flops, moved = cost.of_device(values.device), cost.dense_flops(problem), cost.moved_bytes(problem)
    dense = cost.dense_seconds(flops, moved, problem.family, device)
    dense += 3 * cost.LAUNCH  # to make the weight dense
    return Choice("triton", tile) if ours <= plan.GAIN * dense else DENSE


# ---- Measuring


def prewarm(model: torch.nn.Module, *inputs: Tensor, backward: bool = True) -> dict[str, Measured]:
    """Run ``model(*inputs)`` (and its backward pass) with every candidate timed, and keep the fastest of each layer.

    Call it before training, before DDP wraps the model, and before a CUDA graph is captured; gradients are left as
    they were. Dense is timed with cuDNN's own search on: set ``torch.backends.cudnn.benchmark`` to run it so. Returns
    ``{problem: Measured}`` of all problems measured so far on this device.
    """
    masks.forget_choices()
    before = {parameter: parameter.grad for parameter in model.parameters()}
    with plan.measuring(), torch.set_grad_enabled(backward):
        output = model(*inputs)
        if backward:
            output.float().square().mean().backward()
    for parameter, grad in before.items():
        parameter.grad = grad
    found = plan_of(inputs[0].device)
    found.save()
    return found.measured


def measure(run: Callable[..., Tensor], *operands: Tensor | None) -> Measured | None:
    """Time every candidate of the one op in ``run(*operands)``; None where nothing is timed."""
    if not uses_triton():
        run(*operands)
        return None
    with plan.measuring() as found:
        run(*operands)
    return found[-1] if found else None


def save_plan(device: torch.device) -> None:
    """Keep what was measured on a device for other processes."""
    if uses_triton():
        plan_of(device).save()


@lru_cache(maxsize=16)
def plan_of(device: torch.device) -> Plan:
    return Plan(plan.device_key(device) if device.type == "cuda" else f"{device.type}, interpreted")


# ---- Types


def dtype_name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def family(x: Tensor, conv: bool) -> str:
    if x.dtype in (torch.float16, torch.bfloat16):
        return "half"
    found = kernel_tiles.family(dtype_name(x), x.dtype == torch.float32 and allows_tf32(conv))
    assert found is not None  # refusal() said so
    return found


def allows_tf32(conv: bool) -> bool:
    """torch's own switch: on for convolutions and off for products unless the user says otherwise."""
    backend: Any = torch.backends.cudnn.conv if hasattr(torch.backends.cudnn, "conv") else None
    if backend is not None and hasattr(backend, "fp32_precision"):
        return (backend if conv else torch.backends.cuda.matmul).fp32_precision == "tf32"
    return torch.backends.cudnn.allow_tf32 if conv else torch.backends.cuda.matmul.allow_tf32
