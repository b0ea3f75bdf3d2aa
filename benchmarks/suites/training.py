"""Training steps of whole networks: forward, backward, SGD; dense against ours at every density."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import sparsekd
from benchmarks.lib.contest import Case, Contest, Setup, agree
from benchmarks.lib.models import norms_by_torch
from benchmarks.suites.networks import Source, sources
from benchmarks.suites.students import kept_weights
from sparsekd import BlockSparse
from sparsekd.convert import SPARSE_TYPES

# Some of the many activations that are about 0 are rounded to the other side of their ReLU, and their gradient comes or
# goes whole: between float32 and float64 that is about 1 % of the largest entry in a WRN-16-2, dense or block-sparse.
# Single layers (layers.py) are held to the rounding alone.
FLIPS = 0.1


def cases(setup: Setup) -> list[Case]:
    names = ("dense", *(f"ours_{density:g}" for density in setup.densities))
    # Batch norm cannot be trained on one row.
    return [
        Case(source.id, names, partial(_build, setup, source))
        for source in sources(setup)
        if not source.id.endswith("-n1")
    ]


def _build(setup: Setup, source: Source) -> Contest:
    built = source.build().to(setup.device).train()
    dense = norms_by_torch(copy.deepcopy(built))
    inputs = tuple(x.to(setup.device) for x in source.inputs())
    networks = {"dense": dense}
    for density in setup.densities:
        ours = sparsekd.sparsify(copy.deepcopy(built), density=density, exclude=source.exclude)
        _compare_one_step(source.id, ours, inputs)
        networks[f"ours_{density:g}"] = ours
    whole = kept_weights(dense)
    info = {name: {"weights_share": kept_weights(network) / whole} for name, network in networks.items()}
    return Contest({name: step_of(network, inputs) for name, network in networks.items()}, {}, info)


def step_of(network: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[[], None]:
    """One step with momentum. The learning rate is 0: the same work, and after a thousand steps the same weights."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        network(*inputs).square().mean().backward()
        optimizer.step()

    return step


def _compare_one_step(id: str, ours: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Loss and gradients of `ours` and of its dense twin with zeros; neither is changed."""
    ours = copy.deepcopy(ours)
    twin = sparsekd.densify(copy.deepcopy(ours))
    losses = []
    for network in (ours, twin):
        torch.manual_seed(0)  # dropout
        loss = network(*inputs).square().mean()
        loss.backward()
        losses.append(loss.detach())
    agree(f"{id}: loss", *losses)
    agree_gradients(id, ours, twin, FLIPS)


def agree_gradients(id: str, ours: nn.Module, twin: nn.Module, limit: float | None = None) -> None:
    """Compare the gradients of the kept values with the same entries of the dense twin's gradients."""
    for name, layer in ours.named_modules():
        if isinstance(layer, SPARSE_TYPES):
            peer: Any = twin.get_submodule(name)
            kept = BlockSparse.from_dense(peer.weight.grad, layer.pattern, mask=layer.block_mask()).values
            assert layer.values.grad is not None
            agree(f"{id}: gradient of {name}.values", layer.values.grad, kept, limit)
