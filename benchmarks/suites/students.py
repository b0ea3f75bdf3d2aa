"""Whole networks in inference: dense, dense with the pruned weights as zeros, channel-compacted, and ours.

`*_frozen` went through `sparsekd.freeze` (batch norm folded, layers fused), the dense ones as well: what freezing wins
and what sparsity wins are two things.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

import sparsekd
from benchmarks.lib.contest import Case, Contest, Setup, agree
from benchmarks.suites.compact import compact, count_weights
from benchmarks.suites.networks import Source, sources
from sparsekd.convert import SPARSE_TYPES

NAMES = ("dense", "masked", "compacted", "ours", "dense_frozen", "compacted_frozen", "ours_frozen")


def cases(setup: Setup) -> list[Case]:
    return [
        Case(f"{source.id}-d{density:g}", NAMES, partial(_build, setup, source, density))
        for source in sources(setup)
        for density in setup.densities
    ]


def _build(setup: Setup, source: Source, density: float) -> Contest:
    dense = source.build().to(setup.device).eval()
    inputs = tuple(x.to(setup.device) for x in source.inputs())
    ours = sparsekd.sparsify(copy.deepcopy(dense), density=density, exclude=source.exclude)
    masked = sparsekd.densify(copy.deepcopy(ours))
    networks = {"dense": dense, "masked": masked, "ours": ours}
    peers = {"ours": masked}  # whose outputs must be the same
    absent = {}
    try:
        zeroed, networks["compacted"] = compact(dense, density)
        peers |= {"compacted": zeroed, "compacted_frozen": zeroed}
    except ValueError as error:
        absent["compacted"] = str(error)
    peers |= {"ours_frozen": masked, "dense_frozen": dense}
    for name in ("dense", "compacted", "ours"):
        if name in absent:
            absent[f"{name}_frozen"] = absent[name]
        else:
            networks[f"{name}_frozen"] = sparsekd.freeze(networks[name], inputs, layer_ms=5.0 if setup.quick else 20.0)
    calls = {name: infer(network, inputs) for name, network in networks.items()}
    for name, peer in peers.items():
        if name in calls:
            agree(f"{source.id}: {name}", calls[name](), infer(peer, inputs)())
    whole = count_weights(dense)
    kept = {name: kept_weights(networks[name.removesuffix("_frozen")]) for name in networks}
    info = {name: {"weights": kept[name], "weights_share": kept[name] / whole} for name in networks}
    return Contest(calls, absent, info)


def infer(network: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[[], Tensor]:
    @torch.inference_mode()
    def call() -> Tensor:
        return network(*inputs)

    return call


def kept_weights(network: nn.Module) -> int:
    """Weights of convolutions and linear layers that are stored; masked ones are stored as zeros."""
    sparse = sum(module.num_kept for module in network.modules() if isinstance(module, SPARSE_TYPES))
    return sparse + count_weights(network)
