"""Where and how networks train: the device, the precision, the other ranks, and how long."""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from .. import distributed
from .config import RunConfig


class OutOfTime(Exception):
    """The time that was given is over; what has been done is on disk."""


@dataclass(frozen=True)
class Runtime:
    """Where and how a network trains, which must not change what it learns (but for rounding).

    device    of the networks and of the data.
    bf16      autocast to bfloat16.
    compiled  torch.compile the loss, both networks in one graph; anew after every prune.
    deadline  time.monotonic() after which the epoch that runs is the last of this call.
    alone     whether nothing else trains on this machine at the same time, whose joules would be counted too.
    """

    device: str = "cpu"
    bf16: bool = False
    compiled: bool = False
    deadline: float = math.inf
    alone: bool = True

    def autocast(self) -> torch.autocast:
        return torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.bf16)

    def settings(self) -> dict[str, Any]:
        """What all networks of one report have in common: they round alike."""
        return {"device": torch.device(self.device).type, "bf16": self.bf16, "ranks": distributed.num_ranks()}


def start(config: RunConfig, on_gpu: bool, deadline: float) -> Runtime:
    """Where to train; joins the other ranks if torchrun started this process.

    on_gpu: whether this task trains on CUDA where there is one, and there in bf16, unless `config` says otherwise.
    """
    wanted = config.device or ("cuda" if on_gpu and torch.cuda.is_available() else "cpu")
    device = torch.device(wanted)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("sparsekd run: no CUDA device can be used here, `sparsekd doctor` says why; --device cpu")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    bf16 = device.type == "cuda" and on_gpu if config.bf16 is None else config.bf16
    return Runtime(str(device), bf16, config.compiled, deadline)


def rank() -> int:
    """This process's place among those of torchrun; 0 without it."""
    return dist.get_rank() if distributed.num_ranks() > 1 else 0


def wait_for_all() -> None:
    """Until every rank is here: what rank 0 wrote is then there for all."""
    if dist.is_initialized():
        dist.barrier()


def is_over(deadline: float) -> bool:
    """Whether rank 0 says so: all ranks stop after the same epoch."""
    over = [time.monotonic() > deadline]
    if distributed.num_ranks() > 1:
        dist.broadcast_object_list(over, src=0)
    return over[0]
