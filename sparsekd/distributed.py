"""Training on several ranks: one mask everywhere, one gradient everywhere.

    torch.distributed.init_process_group("nccl")                # torchrun starts one process for each GPU
    for module in (teacher, student, distiller):                # the last has SAD's parameters
        distributed.broadcast(module)                           # before anything prunes or rewinds
    method = sparsekd.LTHSAD(distiller, schedule, epochs=60)
    ...
    method.loss(inputs, target).total.backward()
    distributed.average_gradients([*student.parameters(), *method.parameters()])
    optimizer.step()

Every rank scores its own weights, and all of them drop what rank 0 chose (``Pruner.prune_to``). ``average_gradients``
takes any loop and any change of shape. ``data_parallel`` wraps a model in torch's DDP, which overlaps the exchange with
the backward pass; it knows the shapes it was made with, so wrap again after every prune.

On one rank, or without a process group, all of this does nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .nn import BlockSparseLayer
from .nn.embedding_table import SparseTable

__all__ = [
    "average_gradients",
    "broadcast",
    "check_same_masks",
    "check_same_parameters",
    "data_parallel",
    "num_ranks",
    "of_all_ranks",
    "total",
]

_SPARSE = 1 << 16  # a rank with a sparse gradient, where one with a dense one counts 1
ROUNDING = 1e-3  # of the norm of all parameters: far more than ranks on other hardware drift apart


def num_ranks() -> int:
    """Ranks of the default process group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@torch.no_grad()
def broadcast(model: nn.Module) -> None:
    """Give every rank the parameters and buffers of rank 0.

    Raises RuntimeError where ranks hold other shapes: models that were built, or pruned, differently.
    """
    if num_ranks() == 1:
        return
    check_same("tensors", model, [(name, tuple(tensor.shape)) for name, tensor in model.state_dict().items()])
    for tensor in _tensors(model):
        dist.broadcast(tensor, src=0)


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by its mean over the ranks, in one exchange for each dtype.

    Call it between ``backward()`` and ``optimizer.step()``, with the same parameters in the same order on every rank. A
    parameter without a gradient counts as zero if another rank has one. Of a sparse gradient, what it names travels.
    """
    if num_ranks() == 1:
        return
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    kinds = [0 if p.grad is None else _SPARSE if p.grad.is_sparse else 1 for p in trained]
    ranks = torch.tensor(kinds, dtype=torch.int32, device=_device(trained))
    dist.all_reduce(ranks)
    used = []
    for parameter, number in zip(trained, ranks.tolist(), strict=True):
        if number > _SPARSE and number % _SPARSE:
            raise RuntimeError(
                f"sparsekd.distributed.average_gradients: a gradient of shape {tuple(parameter.shape)} is sparse on "
                "some ranks and dense on others; make the table with the same sparse= on all"
            )
        if number >= _SPARSE:
            _average_rows(parameter)
        elif number:
            used.append(parameter)
    for parameter in used:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    for dtype in dict.fromkeys(parameter.dtype for parameter in used):
        grads = [parameter.grad for parameter in used if parameter.dtype == dtype]
        flat = torch.cat([grad.flatten() for grad in grads])  # type: ignore[union-attr]
        dist.all_reduce(flat)
        flat /= num_ranks()
        for grad, mean in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):  # type: ignore[union-attr]
            grad.copy_(mean.view_as(grad))  # type: ignore[union-attr, arg-type]


def _average_rows(parameter: nn.Parameter) -> None:
    """Replace a sparse gradient by its mean: only what some rank touched travels."""
    grad: Any = parameter.grad
    places, terms = torch.empty(0, dtype=torch.int64, device=parameter.device), parameter.detach().new_empty(0)
    if grad is not None:
        grad = grad.coalesce()
        places, terms = grad.indices()[0].contiguous(), grad.values()
    index, sums = of_all_ranks(places), of_all_ranks(terms)
    mean = torch.sparse_coo_tensor(index[None], sums / num_ranks(), parameter.shape, check_invariants=False)
    parameter.grad = mean.coalesce()


def of_all_ranks(rows: Tensor) -> Tensor:
    """The rows ``[n, ...]`` of every rank, one rank after the other; their numbers may differ."""
    if num_ranks() == 1:
        return rows
    counts: list[Any] = [None] * num_ranks()
    dist.all_gather_object(counts, len(rows))
    every = [rows.new_empty(count, *rows.shape[1:]) for count in counts]
    every[dist.get_rank()] = rows.contiguous()
    for rank, theirs in enumerate(every):
        dist.broadcast(theirs, src=rank)
    return torch.cat(every)


def data_parallel(model: nn.Module, **options: Any) -> nn.Module:
    """``model`` in torch's DistributedDataParallel (``options`` are its own), or as it is on one rank.

    The index tensors of block-sparse layers are left out of its exchange of buffers, which would write them anew in
    every step, and a mask that was written is a new mask: its tables would be built again. Instead it is checked here
    that all ranks hold the same masks. Wrap again after every prune: DDP keeps the shapes it was made with.
    """
    if num_ranks() == 1:
        return model
    check_same_masks(model)
    indices = [f"{name}.{index}".lstrip(".") for name, layer in model.named_modules() for index in _index_names(layer)]
    parallel = nn.parallel.DistributedDataParallel
    parallel._set_params_and_buffers_to_ignore_for_model(model, indices)
    return parallel(model, **options)


def check_same_masks(model: nn.Module) -> None:
    """Raise RuntimeError unless every rank keeps the same blocks in every layer and the same entries in every table."""
    if num_ranks() == 1:
        return
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, BlockSparseLayer)]
    masks: list[Any] = [(name, layer.row_ptr.tolist(), layer.col_idx.tolist()) for name, layer in layers]
    tables = [(name, table) for name, table in model.named_modules() if isinstance(table, SparseTable)]
    masks += [(name, hashlib.sha256(table.kept.cpu().numpy().tobytes()).hexdigest()) for name, table in tables]
    check_same("masks", model, masks)


def _index_names(layer: nn.Module) -> tuple[str, ...]:
    if isinstance(layer, SparseTable):
        return ("kept", "base", "counts")
    return ("row_ptr", "col_idx") if isinstance(layer, BlockSparseLayer) else ()


@torch.no_grad()
def check_same_parameters(parameters: Iterable[nn.Parameter]) -> None:
    """Raise RuntimeError, naming a rank, where one holds other values than rank 0 by more than rounding: it has missed
    an exchange of gradients."""
    if num_ranks() == 1:
        return
    mine = torch.cat([parameter.flatten().float() for parameter in parameters])
    first = mine.clone()
    dist.broadcast(first, src=0)
    check_same("parameters", None, bool((mine - first).norm() <= ROUNDING * first.norm()))


def agree(keep: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """The choice of rank 0 in place of this rank's: bool ``[blocks]`` for each layer, on the CPU.

    Weights that are equal score equal, but ranks on other hardware may round a step differently, and one block that is
    kept here and dropped there makes every later exchange one of other shapes.
    """
    if num_ranks() == 1:
        return list(keep)
    check_same("blocks", None, [len(layer) for layer in keep])
    flat = torch.cat([layer.cpu() for layer in keep]).to(device, torch.uint8)
    dist.broadcast(flat, src=0)
    return list(flat.cpu().bool().split([len(layer) for layer in keep]))


def total(tensor: Tensor) -> Tensor:
    """The sum over all ranks."""
    if num_ranks() == 1:
        return tensor
    summed = tensor.clone()
    dist.all_reduce(summed)
    return summed


def check_same(what: str, model: nn.Module | None, mine: Any) -> None:
    everyones: list[Any] = [None] * num_ranks()
    dist.all_gather_object(everyones, mine)
    for rank, theirs in enumerate(everyones):
        if theirs != everyones[0]:
            of = "" if model is None else f" of {type(model).__name__}"
            raise RuntimeError(
                f"sparsekd.distributed: rank {rank} holds other {what}{of} than rank 0; build and prune the model "
                "alike on all ranks, call distributed.broadcast(model) before making a Pruner, and average_gradients "
                "in every step"
            )


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _device(parameters: Sequence[nn.Parameter]) -> torch.device:
    return parameters[0].device if parameters else torch.device("cpu")
