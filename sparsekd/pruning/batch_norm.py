"""Which batch norm a layer feeds, seen in one forward pass: no graph is traced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm  # what 1d, 2d, 3d and the synchronised one derive from

from ..nn import BlockSparseLayer

__all__ = ["BatchNorm", "fed_batch_norms", "first_batch_norm"]


def first_batch_norm(model: nn.Module) -> str | None:
    """The kind of the first batch norm in the model, or None."""
    return next((type(module).__name__ for module in model.modules() if isinstance(module, BatchNorm)), None)


@torch.no_grad()
def fed_batch_norms(model: nn.Module, layers: Mapping[str, Any], example_inputs: Sequence[Any]) -> dict[str, list[str]]:
    """``{batch norm: layers}``: those that every time got the unchanged output of one of the layers.

    A batch norm takes dimension 1 for the channels. In the output of a linear layer they are there only if it is
    ``[N, C]``, so the output must have as many dimensions as the weight.
    """
    dims = {
        name: len(layer.weight_shape if isinstance(layer, BlockSparseLayer) else layer.weight.shape)
        for name, layer in layers.items()
    }
    outputs: dict[int, tuple[Tensor, int, str]] = {}  # holds the tensors, so that no id is used twice
    fed: dict[str, set[str | None]] = {}

    def note_output(name: str, output: Tensor) -> None:
        if output.dim() == dims[name]:
            outputs[id(output)] = (output, output._version, name)

    def note_input(name: str, given: Any) -> None:
        _, version, source = outputs.get(id(given), (None, None, None))
        # An in-place operation (x += shortcut) leaves the same tensor with other contents.
        fed.setdefault(name, set()).add(source if source is not None and given._version == version else None)

    hooks = [
        layer.register_forward_hook(lambda _module, _args, output, name=name: note_output(name, output))
        for name, layer in layers.items()
    ]
    hooks += [
        module.register_forward_pre_hook(lambda _module, args, name=name: note_input(name, args[0] if args else None))
        for name, module in model.named_modules()
        if isinstance(module, BatchNorm)
    ]
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        model(*example_inputs)
    finally:
        for module in training:
            module.training = True
        for hook in hooks:
            hook.remove()
    return {name: sorted(set(filter(None, sources))) for name, sources in fed.items() if None not in sources}
