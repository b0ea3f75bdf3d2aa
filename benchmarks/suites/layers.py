"""Single layers, forward and a step of training: some of several networks, with --layers all of one (shapes.py), with
--model the layers of that network at their real inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

import sparsekd
from benchmarks.lib import shapes
from benchmarks.lib.contest import Case, Contest, Setup, agree
from benchmarks.suites.networks import sources
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


def conv(id: str, n: int, c: int, k: int, image: int, kernel: int = 3, stride: int = 1) -> Layer:
    return Layer(id, lambda: nn.Conv2d(c, k, kernel, stride, kernel // 2), (n, c, image, image))


def linear(id: str, n: int, inputs: int, outputs: int) -> Layer:
    return Layer(id, lambda: nn.Linear(inputs, outputs), (n, inputs))


QUICK = [conv("conv-64-64-8x8", 16, 64, 64, 8), linear("linear-256-256", 64, 256, 256)]
LAYERS = [
    conv("student-32-32-8x8", 64, 32, 32, 8),
    conv("student-32-64-8x8-s2", 64, 32, 64, 8, stride=2),
    conv("student-64-64-4x4", 64, 64, 64, 4),
    conv("wrn-32-32-32x32", 16, 32, 32, 32),
    conv("wrn-128-128-8x8", 16, 128, 128, 8),
    conv("resnet-64-64-56x56", 1, 64, 64, 56),
    conv("resnet-256-256-14x14", 1, 256, 256, 14),
    conv("resnet-512-128-28x28-1x1", 1, 512, 128, 28, kernel=1),
    conv("resnet-512-512-7x7", 1, 512, 512, 7),
    linear("linear-512-512-n1", 1, 512, 512),
    linear("linear-512-512-n64", 64, 512, 512),
    linear("linear-1024-4096-n64", 64, 1024, 4096),
]


def cases(setup: Setup) -> list[Case]:
    found = []
    for layer in _layers(setup):
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
    options = {"layer_ms": 5.0} if setup.device.type == "cpu" else {}
    sparse = {"min_gain": 0.0, **options} if setup.device.type == "cpu" else {}
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


def _layers(setup: Setup) -> list[Layer]:
    if setup.model:
        return _layers_of_model(setup)
    if setup.layers:
        return _layers_of_groups(setup)
    return QUICK if setup.quick else LAYERS


def _layers_of_groups(setup: Setup) -> list[Layer]:
    """Every layer of shapes.py whose group was asked for, at --batch or the batches of its group."""
    found = []
    for shape in (*shapes.CONVS, *shapes.LINEARS):
        if shape.group not in setup.layers:
            continue
        for n in setup.layer_batches or shapes.BATCHES[shape.group]:
            if isinstance(shape, shapes.Linear):
                found.append(
                    linear(f"{shape.group}-{shape.inputs}-{shape.outputs}-n{n}", n, shape.inputs, shape.outputs)
                )
                continue
            c, k, image = shape.channels, shape.out_channels, shape.size
            id = f"{shape.group}-{c}-{k}-{image}x{image}-k{shape.kernel}s{shape.stride}-n{n}"
            found.append(conv(id, n, c, k, image, shape.kernel, shape.stride))
    return found


def _layers_of_model(setup: Setup) -> list[Layer]:
    """Each layer of --model that `sparsify` would take, once for every geometry, with the input it gets."""
    (source,) = sources(setup)
    model = source.build().eval()
    wanted = {name for name, _ in named_layers(model, DENSE_TYPES, None, source.exclude)}
    found: dict[str, Layer] = {}

    def keep(name: str, module: nn.Conv2d | nn.Linear, shape: tuple[int, ...]) -> None:
        described = f"{module} at {shape}"
        found.setdefault(described, Layer(f"{source.id}-{name}", lambda: module, shape))

    for name in sorted(wanted):
        module = model.get_submodule(name)
        if getattr(module, "groups", 1) == 1:
            module.register_forward_hook(lambda m, args, _, name=name: keep(name, m, tuple(args[0].shape)))
    with torch.inference_mode():
        model(*source.inputs())
    for module in model.modules():
        module._forward_hooks.clear()
    return list(found.values())
