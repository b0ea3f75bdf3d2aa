"""A copy of a model to freeze: in eval mode, with its reparametrised weights computed once and for all."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from .kinds import LAYERS, LIFTED


def prepare(model: nn.Module) -> nn.Module:
    """The copy; a bare layer becomes a network of one."""
    copied = _copy(model).eval()
    for module in copied.modules():
        if not isinstance(module, torch.jit.ScriptModule):
            _compute_weights(module)
            _drop_hooks_that_only_look(module)
    return nn.Sequential(copied) if isinstance(copied, (*LAYERS, *LIFTED)) else copied


def _copy(model: nn.Module) -> nn.Module:
    """As copy.deepcopy, also of what it refuses: a weight that hooks computed in the last forward pass, and tensors
    made under torch.inference_mode, which a frozen network would have to be called under too."""
    memo: dict[int, Any] = {}
    with torch.inference_mode(False), torch.no_grad():
        for module in model.modules():
            own = [] if isinstance(module, torch.jit.ScriptModule) else list(vars(module).values())
            held = [*module._parameters.values(), *module._buffers.values(), *own]
            for tensor in held:
                if isinstance(tensor, Tensor) and (not tensor.is_leaf or tensor.is_inference()):
                    plain: Tensor = tensor.detach().clone()
                    is_parameter = isinstance(tensor, nn.Parameter)
                    memo[id(tensor)] = nn.Parameter(plain, tensor.requires_grad) if is_parameter else plain
        return copy.deepcopy(model, memo)


def _drop_hooks_that_only_look(module: nn.Module) -> None:
    """The taps of a student that is still under its Distiller would keep its activations from being fused."""
    for key, hook in list(module._forward_hooks.items()):
        if getattr(hook, "only_looks", False):
            del module._forward_hooks[key]


def _compute_weights(module: nn.Module) -> None:
    """Makes the weights that parametrizations and hooks of torch compute at every call what they are now."""
    if parametrize.is_parametrized(module):
        # torch's own function takes the property from the class, which the user's model has too.
        values = {str(name): getattr(module, str(name)).detach() for name in module.parametrizations}  # type: ignore
        del module.parametrizations
        module.__class__ = type(module).__mro__[1]
        for name, value in values.items():
            module.register_parameter(name, nn.Parameter(value.clone(), requires_grad=False))
    hooks = list(module._forward_pre_hooks.values())
    if not hooks:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's functions for the old kinds are deprecated
        for hook in hooks:
            kind, name = type(hook).__name__, getattr(hook, "name", "weight")
            if isinstance(hook, prune.BasePruningMethod):
                prune.remove(module, hook._tensor_name)  # type: ignore[attr-defined]
            elif kind == "WeightNorm":
                torch.nn.utils.remove_weight_norm(module, name)
            elif kind == "SpectralNorm":
                with torch.no_grad():
                    torch.nn.utils.remove_spectral_norm(module, name)


__all__ = ["prepare"]
