"""Which batch norm a convolution feeds, seen in one forward pass: no graph is traced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def fed_batch_norms(
    model: nn.Module, convolutions: dict[str, nn.Module], example_inputs: Sequence[Any]
) -> dict[str, list[str]]:
    """``{batch norm: convolutions}``: those that every time got the unchanged output of one of the convolutions."""
    outputs: dict[int, tuple[Tensor, int, str]] = {}  # holds the tensors, so that no id is used twice
    fed: dict[str, set[str | None]] = {}

    def note_output(name: str, output: Tensor) -> None:
        outputs[id(output)] = (output, output._version, name)

    def note_input(name: str, given: Any) -> None:
        _, version, source = outputs.get(id(given), (None, None, None))
        # An in-place operation (x += shortcut) leaves the same tensor with other contents.
        fed.setdefault(name, set()).add(source if source is not None and given._version == version else None)

    hooks = [
        layer.register_forward_hook(lambda _module, _args, output, name=name: note_output(name, output))
        for name, layer in convolutions.items()
    ]
    hooks += [
        module.register_forward_pre_hook(lambda _module, args, name=name: note_input(name, args[0] if args else None))
        for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d)
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
