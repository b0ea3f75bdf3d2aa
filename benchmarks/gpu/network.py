"""Whole networks: inference and training steps in CUDA graphs, dense against sparse, in time or in joules.

    python -m benchmarks.gpu.network infer --network resnet50 --batch 256     # and frozen: folded, fused, in a graph
    python -m benchmarks.gpu.network train --network wrn-28-10 --batch 128
    python -m benchmarks.gpu.network energy --network vgg16 --density 0.3      # windows of 5 s, interleaved, idle net
    python -m benchmarks.gpu.network infer --compiled --compile-only          # fills the cache of the compiler alone

Dense is torch with channels_last and cuDNN autotuned. "masked" is the same dense network with the dropped weights set
to zero: zeros draw less power at the same time, so energy is held against both. Sparse layers are the 3x3 ones.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.gpu import common
from benchmarks.gpu.layers import digits
from benchmarks.gpu.rows import Rows
from benchmarks.lib.models import Basic, ResNet, conv_norm, resnet34, resnet50, vgg16, wide_resnet_28_10
from benchmarks.lib.shapes import Conv
from sparsekd import freeze
from sparsekd.nn import SparseConv2d


def tiny() -> nn.Module:
    """For a rehearsal."""
    return ResNet(conv_norm(3, 16, 3, act=nn.ReLU), 16, [(16, 1), (32, 1)], Basic)


NETWORKS: dict[str, tuple[int, Callable[[], nn.Module]]] = {  # name: (image, network)
    "resnet50": (224, resnet50),
    "resnet34": (224, resnet34),
    "wrn-28-10": (32, wide_resnet_28_10),
    "vgg16": (224, vgg16),
    "tiny": (8, tiny),
}


def is_pruned(module: nn.Module, narrowest: int = 64) -> bool:
    """Whether a layer is a 3x3 convolution of at least so many channels."""
    return isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3) and module.in_channels >= narrowest


def sparse_twin(model: nn.Module, density: float, kind: str, device: torch.device, narrowest: int) -> nn.Module:
    """A copy whose layers that `is_pruned` names are block-sparse."""
    twin = copy.deepcopy(model)
    for name, conv in list(twin.named_modules()):
        if not isinstance(conv, nn.Conv2d) or not is_pruned(conv, narrowest):
            continue
        layer = Conv(name, conv.in_channels, 1, conv.out_channels, 3)
        pattern = common.pattern_for(layer, device)
        mask = common.mask_of(layer, pattern, density, kind).to(device)
        parent, _, last = name.rpartition(".")
        setattr(twin.get_submodule(parent), last, SparseConv2d.from_dense(conv, pattern, mask=mask))
    return twin


def masked_twin(sparse: nn.Module) -> nn.Module:
    """The dense network with the weights of ``sparse``: zeros where no block is kept."""
    twin = copy.deepcopy(sparse)
    for name, layer in list(twin.named_modules()):
        if isinstance(layer, SparseConv2d):
            parent, _, last = name.rpartition(".")
            dense = layer.to_dense().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            setattr(twin.get_submodule(parent), last, dense)
    return twin


def inference(model: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    """One forward pass, in a CUDA graph where there is CUDA."""
    model.eval()

    def step() -> None:
        with torch.no_grad():
            model(x)

    return in_graph(step, x.device)


def training(model: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    """Forward, backward and a step of SGD with momentum, in bfloat16 autocast, in a CUDA graph where there is CUDA."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    target = torch.zeros(x.shape[0], dtype=torch.long, device=x.device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda, cache_enabled=False):
            loss = nn.functional.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()

    return in_graph(step, x.device)


def in_graph(step: Callable[[], None], device: torch.device) -> Callable[[], object]:
    if device.type == "cpu":
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


Step = Callable[[], object]


class Contest:
    """The networks of a run, each made when its turn comes: what is measured first is kept if the rest is cut off."""

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        self._options, self._device = options, device
        image, build = NETWORKS[options.network]
        torch.manual_seed(0)
        dtype = torch.float32 if options.what == "train" or device.type == "cpu" else torch.bfloat16
        self._dense = build().to(device, dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        x = torch.randn(options.batch, 3, image, image, device=device, dtype=dtype)
        self._x = x.contiguous(memory_format=torch.channels_last)

    def steps(self) -> dict[str, Callable[[], Step]]:
        """Name -> maker of a step. The first is what the others are held against; the longest to make is last."""
        options, found = self._options, dict[str, Callable[[], Step]]()
        compiles = options.compiled and self._device.type == "cuda"  # a compiler of the CPU is none of this
        energy = options.what == "energy"
        if energy and compiles:
            found["dense, compiled"] = self._compiled
        else:
            found["dense"] = lambda: self._run(copy.deepcopy(self._dense))
        if energy:
            found["masked"] = lambda: self._run(masked_twin(self._sparse(options.density[-1])))
        for density in options.density:
            sparse = partial(self._sparse, density)
            if not options.frozen_alone:
                found[f"sparse {density}"] = lambda sparse=sparse: self._run(sparse())  # type: ignore[misc]
            if options.what != "train":
                found[f"sparse {density}, frozen"] = lambda sparse=sparse: self._frozen(sparse())  # type: ignore[misc]
        if options.what != "train":
            found["dense, frozen"] = lambda: self._frozen(self._dense)
        return found | ({"dense, compiled": self._compiled} if compiles else {})

    def _compiled(self) -> Step:
        return self._run(torch.compile(copy.deepcopy(self._dense)))

    def _run(self, model: Any) -> Step:
        return (training if self._options.what == "train" else inference)(model, self._x)

    def _frozen(self, model: nn.Module) -> Step:
        return partial(freeze(model.eval(), self._x), self._x)

    def _sparse(self, density: float) -> nn.Module:
        """Every layer's candidates are measured on the way."""
        from sparsekd.backends import cuda

        trains = self._options.what == "train"
        narrowest = 16 if self._device.type == "cpu" else 64
        twin = sparse_twin(self._dense, density, self._options.mask, self._device, narrowest).train(trains)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._x.is_cuda and trains):
            cuda.prewarm(twin, self._x, backward=trains)
        return twin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["infer", "train", "energy"])
    parser.add_argument("--network", default="resnet50", choices=NETWORKS)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--density", type=float, nargs="*", default=[0.5, 0.3, 0.1])
    parser.add_argument("--mask", default="wide", choices=common.MASKS)
    parser.add_argument("--window", type=float, default=5.0, help="seconds of an energy window")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--cooldown", type=float, default=5.0)
    parser.add_argument("--compiled", action="store_true", help="the dense network by torch.compile, too")
    parser.add_argument("--compile-only", action="store_true", help="measure nothing; the compiled network is made")
    parser.add_argument("--frozen-alone", action="store_true", help="of sparse networks the frozen ones only")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--out", default="benchmarks/results/gpu")
    options = parser.parse_args()
    device = common.start(options.rehearse)
    if options.rehearse:
        options.network, options.batch, options.density = "tiny", 1, [0.5]
        options.window, options.rounds, options.cooldown = 0.1, 1, 0.0
    before = common.facts(device)
    steps = Contest(options, device).steps()
    if options.compile_only:
        steps.get("dense, compiled", lambda: None)()
        return
    stage = f"{options.what}-{options.network}-{options.batch}"
    kept = Rows(Path(options.out) / "rows" / f"{stage}.jsonl")
    for row in joules(steps, options) if options.what == "energy" else seconds(steps, kept):
        row |= {"network": options.network, "batch": options.batch, "mask": options.mask}
        kept.add((row["model"],), row)
        print({name: value for name, value in row.items() if not name.startswith("all_")}, flush=True)
        common.write(options.out, stage, before, device, kept.rows)


def seconds(steps: dict[str, Callable[[], Step]], kept: Rows) -> Iterator[dict[str, Any]]:
    """A row for each network that has none yet, the moment it is measured: in turns with the first, which is dense."""
    (name, make), *others = steps.items()
    dense = make()
    if (name,) not in kept:
        (us,) = common.medians([dense])
        yield {"model": name, "us": round(us, 1), "speedup": 1.0}
    for name, make in others:
        if (name,) not in kept:
            theirs, us = common.medians([dense, make()])
            yield {"model": name, "us": round(us, 1), "dense_us": round(theirs, 1), "speedup": digits(theirs / us)}


def joules(makers: dict[str, Callable[[], Step]], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Per model: seconds and joules of a call, net of idling, their counter, and ratios to dense with intervals."""
    from sparsekd.energy import EnergyMeter, compare

    steps = {name: make() for name, make in makers.items()}
    with EnergyMeter(None if options.rehearse else "cuda", idle_seconds=options.window) as meter:
        found = compare(
            steps,
            seconds=options.window,
            warmup=options.window / 2,
            rounds=options.rounds,
            cooldown=options.cooldown,
            meter=meter,
        )
    rows = []
    for name, one in found.measurements.items():
        ratio = found.joules_ratio.get(name)
        rows.append(
            {
                "model": name,
                "us": round(one.seconds_per_call * 1e6, 1),
                "joules": one.joules_per_call,
                "watts": one.watts,
                "idle_joules_subtracted": one.idle_subtracted,
                "source": one.source,
                "ticks": one.ticks,
                "seconds_ratio": found.seconds_ratio[name].value if name in found.seconds_ratio else 1.0,
                "joules_ratio": None if ratio is None else [ratio.value, ratio.low, ratio.high],
                "note": one.reason or one.warning,
                "all_joules": one.round_joules,
                "all_seconds": one.round_seconds,
            }
        )
    return rows


if __name__ == "__main__":
    main()
