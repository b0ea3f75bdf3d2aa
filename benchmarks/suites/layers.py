"""Single layers, forward and a step of training: some of several networks, with --layers all of one (shapes.py), with
--model the layers of that network at their real inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import sparsekd
from benchmarks.lib import shapes
from benchmarks.lib.contest import Case, Contest, Setup, agree
from benchmarks.suites.networks import Source, sources
from benchmarks.suites.students import infer
from benchmarks.suites.training import agree_gradients
from sparsekd import BlockSparse
from sparsekd.convert import DENSE_TYPES, named_layers
from sparsekd.nn import SparseConv2d, SparseLinear


@dataclass(frozen=True)
class Layer:
    """A dense layer to build and the shape of its input."""

    id: str
    build: Callable[[], nn.Conv2d | nn.Linear]
    input: tuple[int, ...]


def at(id: str, n: int, shape: shapes.Layer) -> Layer:
    """A layer of shapes.py at a batch size."""
    return Layer(id, shape.build, (n, *shape.input))


def cases(setup: Setup) -> list[Case]:
    found = []
    for layer in layers_of(setup):
        for d in setup.densities:
            names = ("dense", "ours", "dense_frozen", "ours_frozen")
            found.append(Case(f"forward-{layer.id}-d{d:g}", names, partial(forward, setup, layer, d)))
            found.append(Case(f"step-{layer.id}-d{d:g}", ("dense", "ours"), partial(step, setup, layer, d)))
    return found


def sparse_of(dense: nn.Conv2d | nn.Linear, density: float) -> SparseConv2d | SparseLinear:
    kind = SparseConv2d if isinstance(dense, nn.Conv2d) else SparseLinear
    return kind.from_dense(dense, density=density)


def forward(setup: Setup, layer: Layer, density: float) -> Contest:
    """Inference. Frozen on a CPU: the sparse kernels whether they win or not, and torch's best dense ones."""
    ours = sparse_of(layer.build().to(setup.device), density).eval()
    dense = ours.to_dense()
    inputs = (torch.randn(layer.input, device=setup.device),)
    # On a GPU the planner of backends.cuda chooses.
    options: dict[str, Any] = {"layer_ms": 5.0} if setup.device.type == "cpu" else {}
    sparse: dict[str, Any] = {"min_gain": 0.0, **options} if setup.device.type == "cpu" else {}
    networks: dict[str, nn.Module] = {
        "dense": dense,
        "ours": ours,
        "dense_frozen": sparsekd.freeze(dense, inputs, **options),
        "ours_frozen": sparsekd.freeze(ours, inputs, **sparse),
    }
    calls = {name: infer(network, inputs) for name, network in networks.items()}
    expected = calls["dense"]()
    for name, call in calls.items():
        agree(f"{layer.id}: {name}", call(), expected)
    share = {"weights_share": ours.density}
    return Contest(calls, {}, {name: share for name in calls if name.startswith("ours")})


def step(setup: Setup, layer: Layer, density: float) -> Contest:
    """Forward and both gradients."""
    ours = sparse_of(layer.build().to(setup.device), density)
    dense = ours.to_dense()
    x = torch.randn(layer.input, device=setup.device, requires_grad=True)
    gradient = torch.randn_like(dense(x))
    calls = {name: _gradients(one, x, gradient) for name, one in (("dense", dense), ("ours", ours))}
    agree(f"{layer.id}: gradient of the input", calls["ours"]()[0], calls["dense"]()[0])
    ours(x).backward(gradient)
    dense(x).backward(gradient)
    agree_gradients(layer.id, nn.Sequential(ours), nn.Sequential(dense))
    return Contest(calls, {}, {"ours": {"weights_share": ours.density}})


def gradient(setup: Setup, layer: Layer, density: float, of: str) -> Contest:
    """One gradient kernel alone, of the "input" or of the "weight"; the forward pass is done once."""
    ours = sparse_of(layer.build().to(setup.device), density)
    dense = ours.to_dense()
    x = torch.randn(layer.input, device=setup.device, requires_grad=of == "input")
    for one in (dense, ours):
        one.requires_grad_(of == "weight")
        if one.bias is not None:
            one.bias.requires_grad_(False)
    outputs = {"dense": dense(x), "ours": ours(x)}
    gradient = torch.randn_like(outputs["dense"])
    weights = {"dense": dense.weight, "ours": ours.values}

    def call(name: str) -> Callable[[], Tensor]:
        wanted = x if of == "input" else weights[name]
        return lambda: torch.autograd.grad(outputs[name], wanted, gradient, retain_graph=True)[0]

    calls = {name: call(name) for name in outputs}
    expected = calls["dense"]()
    if of == "weight":
        expected = BlockSparse.from_dense(expected, ours.pattern, mask=ours.block_mask()).values
    agree(f"{layer.id}: gradient of the {of}", calls["ours"](), expected)
    return Contest(calls, {}, {"ours": {"weights_share": ours.density}})


def _gradients(layer: nn.Module, x: Tensor, gradient: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    wanted = [x, *layer.parameters()]
    return lambda: torch.autograd.grad(layer(x), wanted, gradient)


def layers_of(setup: Setup) -> list[Layer]:
    if setup.model:
        return layers_of_model(setup)
    if setup.layers:
        return layers_of_groups(setup)
    chosen = shapes.QUICK if setup.quick else shapes.SUITE
    return [at(id, n, shape) for id, (n, shape) in chosen.items()]


def layers_of_groups(setup: Setup) -> list[Layer]:
    """Every layer of shapes.py whose group was asked for, at --batch or the batches of its group."""
    found = []
    every: list[shapes.Layer] = [*shapes.CONVS, *shapes.LINEARS]
    for shape in every:
        if shape.group not in setup.layers:
            continue
        for n in setup.layer_batches or shapes.BATCHES[shape.group]:
            if isinstance(shape, shapes.Linear):
                sizes = f"{shape.inputs}-{shape.outputs}"
            else:
                sizes = (
                    f"{shape.channels}-{shape.out_channels}-{shape.size}x{shape.size}-k{shape.kernel}s{shape.stride}"
                )
            found.append(at(f"{shape.group}-{sizes}-n{n}", n, shape))
    return found


def layers_of_model(setup: Setup) -> list[Layer]:
    """Each layer of --model that `sparsify` would take, once for every geometry, with the input it gets."""
    return [layer for source in sources(setup) for layer in _layers_of(source)]


def _layers_of(source: Source) -> list[Layer]:
    model = source.build().eval()
    wanted = {name for name, _ in named_layers(model, DENSE_TYPES, None, source.exclude)}
    found: dict[str, Layer] = {}

    def keep(name: str, module: nn.Conv2d | nn.Linear, shape: tuple[int, ...]) -> None:
        described = f"{module} at {shape}"
        found.setdefault(described, Layer(f"{source.id}-{name}", lambda: module, shape))

    hooks = []
    for name in sorted(wanted):
        module = model.get_submodule(name)
        if getattr(module, "groups", 1) == 1:
            hook = module.register_forward_hook(lambda m, args, _, name=name: keep(name, m, tuple(args[0].shape)))
            hooks.append(hook)
    with torch.inference_mode():
        model(*source.inputs())
    for hook in hooks:
        hook.remove()
    return list(found.values())
