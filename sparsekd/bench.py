"""How much faster a network gets here: dense eager, dense frozen and block-sparse frozen, timed in turns.

    sparsekd bench my_package.models:resnet --input-shape 3,224,224 --batch 1 16 --budget macs=0.3 latency_us=900

`factory()` makes the network; nothing is trained. For each density the blocks of largest norm stay in every layer, and
for each budget those that are worth most for what they cost, as ``sparsekd.sparsify`` keeps them. The time of a layer
does not depend on which these are, but that of a network on how many each layer keeps: prune a student by the budget
that was measured here.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import check_density
from .freeze import freeze
from .freeze.measure import measure
from .pruning import Budget, count_macs, count_weights, sparsify

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def load(name: str, command: str = "bench") -> nn.Module:
    """The network that `package.module:factory` makes for a command. Raises ValueError for a name of anything else."""
    module, colon, factory = name.partition(":")
    if not colon:
        raise ValueError(f"sparsekd {command}: a model must be package.module:factory, got {name!r}")
    try:
        make: Callable[[], Any] = getattr(importlib.import_module(module), factory)
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(
            f"sparsekd {command}: expected {name!r} to name a function or class to call: {error}"
        ) from error
    try:
        inspect.signature(make).bind()
    except TypeError as error:
        raise ValueError(f"sparsekd {command}: {name} must be callable without arguments: {error}") from error
    except ValueError:
        pass  # what is compiled does not say what it takes
    model = make()
    if not isinstance(model, nn.Module):
        raise ValueError(f"sparsekd {command}: {name} must make an nn.Module, got {type(model).__name__}")
    return model


def bench(
    name: str,
    input_shapes: Sequence[tuple[int, ...]],
    *,
    batches: Sequence[int] = (1,),
    threads: Sequence[int] = (),
    densities: Sequence[float] = (0.5, 0.3, 0.1),
    budgets: Sequence[Budget] = (),
    scope: str = "cost",
    dtype: str = "fp32",
    exclude: Sequence[str] | None = None,
    seconds: float = 2.0,
) -> list[dict[str, Any]]:
    """One row for each number of threads, batch size, and density or budget of one network.

    Args:
        name: ``package.module:factory``.
        input_shapes: of each input tensor, without the batch.
        threads: default: as many as torch uses now.
        densities: shares of the weights of every layer to keep.
        budgets: of the whole network, see :func:`budget`. Microseconds are those of each batch size.
        scope: how a budget chooses, as in ``sparsify``.
        exclude: layers that stay dense, shell-style patterns on module names.
        seconds: to measure one batch size for.

    A row holds ``model, dtype, threads, batch``, what was asked for as ``budget`` ("density=0.3", "macs=0.3"), and as
    ``density`` if it was one, the shares of ``weights`` and ``macs`` that are kept, median milliseconds of one call as
    ``eager_ms`` (the faster of contiguous and channels_last), ``dense_frozen_ms`` and ``frozen_ms``, of the convolution
    and linear layers, how many run ``sparse``, and in ``left_out`` what could not be timed, with the reason.

    Raises ValueError for bad arguments, and for a network without a layer to prune or with one that is never called,
    which ``exclude`` leaves out; RuntimeError where the network does not take such inputs.
    """
    for density in densities:
        check_density("sparsekd bench", density)
    for what, numbers in (("batch", batches), ("threads", threads)):
        if any(number < 1 for number in numbers):
            raise ValueError(f"sparsekd bench: {what} must be 1 or more, got {list(numbers)}")
    if not 0 < seconds < float("inf"):
        raise ValueError(f"sparsekd bench: seconds must be a number above 0, got {seconds:g}")
    model = load(name).to(DTYPES[dtype]).eval()
    rows, before = [], torch.get_num_threads()
    try:
        for count in threads or (before,):
            torch.set_num_threads(count)
            for batch in batches:
                inputs = tuple(torch.randn(batch, *shape).to(DTYPES[dtype]) for shape in input_shapes)
                common = {"model": name, "dtype": dtype, "threads": count, "batch": batch}
                _check_takes(name, model, inputs)
                sparse = _pruned(model, inputs, densities, budgets, scope, exclude)
                rows += [common | row for row in _compare(model, inputs, sparse, seconds)]
    finally:
        torch.set_num_threads(before)
    return rows


def _pruned(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    densities: Sequence[float],
    budgets: Sequence[Budget],
    scope: Any,
    exclude: Sequence[str] | None,
) -> dict[str, tuple[nn.Module, float, float]]:
    """What was asked for -> (the network, shares of weights and of multiply-adds that are left)."""
    networks = {f"density={d:g}": sparsify(copy.deepcopy(model), density=d, exclude=exclude) for d in densities}
    for one in budgets:
        number: Any = {one.unit: one.number}
        options: Any = {"exclude": exclude, "scope": scope, "example_inputs": inputs}
        networks[str(one)] = sparsify(copy.deepcopy(model), **number, **options)
    pruned = {}
    for asked, network in networks.items():
        dense, now = count_macs(network, inputs, exclude)
        weights, kept = count_weights(network, exclude)
        if not dense:
            raise ValueError(
                "sparsekd bench: the network calls no layer that can be block-sparse; look at exclude, and at "
                "sparsekd.conversion_report(model), which says what stays dense and why"
            )
        pruned[asked] = (network, kept / weights, now / dense)
    return pruned


@torch.no_grad()
def _check_takes(name: str, model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    try:
        model(*inputs)
    except (RuntimeError, TypeError) as error:
        shapes = [list(x.shape) for x in inputs]
        raise RuntimeError(
            f"sparsekd bench: {name} does not take inputs of shape {shapes} (the batch, then "
            f"--input-shape, one for each input, of floats): {error}"
        ) from error


@torch.no_grad()
def _compare(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    sparse: Mapping[str, tuple[nn.Module, float, float]],
    seconds: float,
) -> list[dict[str, Any]]:
    frozen = {asked: freeze(network, inputs) for asked, (network, _, _) in sparse.items()}
    calls: dict[str, Callable[[], object]] = {"eager": partial(model, *inputs)}
    channels_last, why_not = _channels_last(model, inputs)
    if why_not is None:
        calls["channels_last"] = channels_last
    calls |= {key: partial(network, *inputs) for key, network in {"dense": freeze(model, inputs), **frozen}.items()}
    samples = measure(calls, seconds)
    ms = {key: statistics.median(us) / 1e3 for key, us in samples.items()}
    return [
        {
            "budget": asked,
            "density": float(asked.removeprefix("density=")) if asked.startswith("density=") else None,
            "weights": sparse[asked][1],
            "macs": sparse[asked][2],
            "eager_ms": min(ms["eager"], ms.get("channels_last", ms["eager"])),
            "dense_frozen_ms": ms["dense"],
            "frozen_ms": ms[asked],
            "sparse": sum(layer.chosen == "sparse" for layer in network.plan),
            "layers": sum(not (layer.geometry.pool or layer.geometry.between) for layer in network.plan),
            "left_out": {} if why_not is None else {"channels_last": why_not},
        }
        for asked, network in frozen.items()
    ]


def _channels_last(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Callable[[], object], str | None]:
    """The call in channels_last, and why it cannot be timed: a model that views its maps, for one, does not take it."""
    images = (x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x for x in inputs)
    in_channels_last: nn.Module = copy.deepcopy(model)
    in_channels_last.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    call = partial(in_channels_last, *images)
    try:
        call()
    except RuntimeError as error:
        return call, f"{type(error).__name__}: {error}".splitlines()[0]
    return call, None


_HEADING = (
    *("kept", "threads", "batch", "weights", "multiply-adds", "layers sparse"),
    *("dense eager, ms", "dense frozen, ms", "sparse frozen, ms", "x eager", "x dense frozen"),
)


def table(rows: Sequence[dict[str, Any]], draw: Callable[[Sequence[str], Sequence[Sequence[str]]], str]) -> str:
    """The rows, as `draw` shows heading and rows; ratios say how many times as fast the frozen sparse network is."""
    cells = []
    for row in rows:
        eager, dense, ours = row["eager_ms"], row["dense_frozen_ms"], row["frozen_ms"]
        cells.append(
            [
                row["budget"],
                f"{row['threads']}",
                f"{row['batch']}",
                f"{row['weights']:.1%}",
                f"{row['macs']:.1%}",
                f"{row['sparse']} of {row['layers']}",
                *(f"{ms:.3f}" for ms in (eager, dense, ours)),
                f"{eager / ours:.2f}",
                f"{dense / ours:.2f}",
            ]
        )
    left_out = {(what, why) for row in rows for what, why in row.get("left_out", {}).items()}
    notes = [f"\nDense eager without {what}, which could not run: {why}" for what, why in sorted(left_out)]
    return "\n".join([draw(_HEADING, cells), *notes])
