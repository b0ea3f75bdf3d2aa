"""A file of an exported network inside torch, without the model's class."""

from __future__ import annotations

import json
import os
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn


class LoadedNetwork(nn.Module):
    """An exported network as a module: inference only, on the CPU, called as the model was, with tensors by position or
    by name. Several threads may call one at once."""

    def __init__(self, path: str | os.PathLike[str], threads: int | None = None) -> None:
        super().__init__()
        from ...runtime import Session  # here, because it needs the compiled module, and `freeze` does not

        self.session = Session(path, threads=torch.get_num_threads() if threads is None else threads)
        self.result = _result_of(path)
        self._names = [one.name for one in self.session.inputs]
        super().train(False)

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Any:
        given = [*args, *(kwargs.pop(name) for name in self._names[len(args) :] if name in kwargs)]
        if kwargs or len(given) != len(self._names):
            raise TypeError(
                f"sparsekd.LoadedNetwork: expected the tensors {self._names}, got {len(args)} by position and "
                f"{sorted(kwargs)} besides"
            )
        outputs = self.session._run([_array(port, x) for port, x in zip(self.session.inputs, given, strict=True)])
        return _built(self.result, [torch.from_numpy(y) for y in outputs])

    def train(self, mode: bool = True) -> LoadedNetwork:
        if mode:
            raise RuntimeError(
                "sparsekd.LoadedNetwork: an exported network cannot train; train its model, export again"
            )
        return self

    def extra_repr(self) -> str:
        return repr(self.session)

    def __copy__(self) -> LoadedNetwork:
        return self  # nothing in it ever changes

    def __deepcopy__(self, memo: dict[int, Any]) -> LoadedNetwork:
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "sparsekd.LoadedNetwork: an exported network is no data for pickle; hand its file's path to the other "
            "process, and call sparsekd.load_frozen(path) there"
        )


_CASTS = {"float32": "float()", "int64": "long()", "int32": "int()"}


def load(path: str | os.PathLike[str], threads: int | None) -> LoadedNetwork:
    try:
        return LoadedNetwork(path, threads)
    except ValueError as error:
        if "no exported network" not in str(error):
            raise
        raise ValueError(
            f"sparsekd.load_frozen: {path} is no exported network; a file of FrozenModel.save needs the model's class: "
            "load_frozen(path, model)"
        ) from error


def is_exported(path: str | os.PathLike[str]) -> bool:
    """Whether this is a file of ``FrozenModel.export``, damaged or not."""
    try:
        with safe_open(path, framework="pt") as file:
            return '"sparsekd-network"' in (file.metadata() or {}).get("sparsekd", "")
    except (SafetensorError, OSError):
        return False


def _array(port: Any, x: Any) -> Any:
    """port: of `Session.inputs`."""
    if not isinstance(x, Tensor) or not x.is_cpu:
        got = f"a tensor on {x.device}" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"sparsekd.LoadedNetwork: expected {port.name!r} to be a tensor on the CPU, got {got}")
    if str(x.dtype) != f"torch.{port.dtype}":
        raise TypeError(
            f"sparsekd.LoadedNetwork: expected {port.name!r} of the type {port.dtype}, got {x.dtype}; use "
            f"x.{_CASTS.get(port.dtype, f'to(torch.{port.dtype})')}"
        )
    return x.detach().contiguous().numpy()


def _result_of(path: str | os.PathLike[str]) -> Any:
    try:
        with safe_open(path, framework="pt") as file:
            result = json.loads(file.metadata()["sparsekd"]).get("result")
    except (SafetensorError, KeyError, TypeError, ValueError) as error:  # the session read it: it was changed since
        raise ValueError(f"sparsekd.load_frozen: {path} is damaged ({error})") from error
    return result


def _built(pattern: Any, outputs: list[Tensor], depth: int = 0) -> Any:
    """The model's result of its tensors; where a file says nothing sensible about it, the tensors."""
    if isinstance(pattern, dict) and len(pattern) == 1 and depth < 50:
        ((kind, content),) = pattern.items()
        if kind == "output" and type(content) is int and 0 <= content < len(outputs):
            return outputs[content]
        if kind == "tuple" and isinstance(content, list):
            return tuple(_built(one, outputs, depth + 1) for one in content)
        if kind == "dict" and isinstance(content, dict):
            return {key: _built(one, outputs, depth + 1) for key, one in content.items()}
    raise ValueError(f"sparsekd.load_frozen: the file says that the network returns {str(pattern)[:60]}")


__all__ = ["LoadedNetwork", "is_exported", "load"]
