"""The file from which a training goes on after a kill: every part as it was, what happened, under which settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import checkpoint

_REMEDY = "delete it to train this network from its start, or pass --fresh to begin the run anew"


class StateFile:
    """The state of `parts`, which have state_dict() and load_state_dict(), at a boundary: an epoch's, or a window's.

    `resume` loads them in the order of `parts`. Let the method come first and the optimizer last: pruning changes the
    shapes of the parameters that the optimizer has moments of.

    `device` is that of the networks: on a GPU dropout draws from a generator of its own, which is kept too.
    """

    def __init__(
        self, path: Path, parts: Mapping[str, Any], settings: Mapping[str, Any], device: torch.device | str = "cpu"
    ) -> None:
        self.path, self.parts, self.settings = path, parts, settings
        self.device = torch.device(device)

    def save(self, history: list[dict[str, Any]]) -> None:
        """Write everything, and `history`: a record of each boundary passed."""
        state: dict[str, Any] = {name: dict(part.state_dict()) for name, part in self.parts.items()}
        state |= {"rng": torch.get_rng_state(), "history": history, "settings": dict(self.settings)}
        if self.device.type == "cuda":
            state["cuda_rng"] = torch.cuda.get_rng_state(self.device)
        checkpoint.save_state(state, self.path)

    def resume(self) -> list[dict[str, Any]]:
        """The history so far, and every part as it was after it; an empty one where nothing was saved.

        Raises ValueError where the file was written under other settings.
        """
        if not self.path.is_file():
            return []
        state = checkpoint.load_state(self.path, _REMEDY)
        check_same_settings(self.path, state["settings"], self.settings)
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
            if isinstance(part, torch.optim.Optimizer):
                lay_out_moments(part)
        torch.set_rng_state(state["rng"])
        if self.device.type == "cuda" and "cuda_rng" in state:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)
        return state["history"]


def lay_out_moments(optimizer: torch.optim.Optimizer) -> None:
    """Give moments the memory layout of their parameters. Files hold tensors without one, and torch's fused kernels for
    the CPU go through parameter, gradient and moments in the order in which they lie, whatever their strides."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def in_full(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with those that are left out where they are not used."""
    return {"views": 0, "val_rows": None, "negatives": 1, **settings}


def check_same_settings(path: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise ValueError where a file was written under other settings; one it does not name was not there yet."""
    then, now = (json.loads(json.dumps(in_full(settings))) for settings in (then, now))
    for key in then:
        if then[key] != now.get(key):
            raise ValueError(
                f"sparsekd run: {path} is of another run: its {key} is {then[key]}, now {now.get(key)}; "
                "give another --out, or --fresh to begin anew"
            )
