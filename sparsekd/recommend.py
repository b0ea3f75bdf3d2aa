"""A recommender that is served from its file: tables stay mapped, so that memory is what the requests touch.

    recommend.save(model, task, "films.safetensors")           # MF or LightGCN, dense or sparse
    served = recommend.Served("films.safetensors")
    served.best("4711", 20)                                    # Answer(items=["1856101", ...], scores=[...], rule=...)

What a user has chosen is never recommended again. Two rules for what no row can answer:

    a user who is new, or has no interaction in training, gets the items that most users chose, in that order;
    an item that nobody chose in training is not recommended: its row was never learnt.

The file is one safetensors file: the packed tables of users and items, ready to be looked up, what every user has
chosen, the ids, and the items by popularity.
"""

from __future__ import annotations

import json
import os
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from . import ops
from .checkpoint import write_atomically
from .data import Pairs, Task, histories
from .models import MF, LightGCN, Recommender
from .nn import SparseEmbedding
from .ops.embedding import Table

__all__ = ["Answer", "Served", "save"]

VERSION = 1
_FORMAT = "sparsekd-recommender"
_KEY = "sparsekd"
BY_ROWS = "the items whose rows have the largest product with the row of the user"
BY_POPULARITY = "no interaction in training, so the items that most users chose"
NOT_KNOWN = "not among the users of this file, so the items that most users chose"
_TABLE = ("values", "kept", "base", "counts")


@dataclass(frozen=True)
class Answer:
    """The best items, the best first; their scores (users who chose them, by popularity); the rule that answered."""

    items: list[str]
    scores: list[float]
    rule: str


def save(model: Recommender, task: Task[Pairs], path: str | os.PathLike[str]) -> None:
    """Write what serving needs of a model whose score is a product of rows: `MF`, or `LightGCN` with the rows that it
    propagated, which are dense.

    Raises TypeError for other models, and those that score in a way of their own; ValueError where the task does not
    know the ids of its users and items, or the model is of other sizes or not finite.
    """
    train, test = task.train, task.test
    if train.user_ids is None or train.item_ids is None:
        raise ValueError(
            "sparsekd.recommend.save: the task must know the ids of users and items; data.load('rankings') does"
        )
    tables = dict(zip(("users", "items"), _packed(model), strict=True))
    _check_are_of_task(tables, train)
    tensors = {
        f"{side}.{name}": part for side, table in tables.items() for name, part in zip(_TABLE, table.table, strict=True)
    }
    chosen = [torch.cat([test.users, _users_of(test)]), torch.cat([test.items, test.seen_items])]
    offsets, items = histories(chosen[0].cpu(), chosen[1].cpu(), len(train.user_ids), train.num_items)
    times = torch.bincount(train.seen_items.cpu(), minlength=train.num_items)
    order = times.sort(descending=True, stable=True).indices
    tensors |= {"chosen.offsets": offsets, "chosen.items": items, "popular": order, "times": times}
    tensors["learnt"] = train.seen_offsets.cpu().diff() > 0
    ids = {"users": train.user_ids, "items": train.item_ids}
    for side, known in ids.items():
        tensors |= {f"{side}.{name}": part for name, part in _of_ids(known).items()}
    header = {
        "format": _FORMAT,
        "version": VERSION,
        "dim": tables["items"].embedding_dim,
        "text": {side: not np.issubdtype(known.dtype, np.integer) for side, known in ids.items()},
        "task": task.name,
        "model": type(model).__name__,
    }
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_atomically(path, to_bytes(plain, {_KEY: json.dumps(header)}))


class Served:
    """A file that `save` wrote, mapped.  Raises FileNotFoundError, ValueError for one that is foreign or cut short."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        if not Path(path).is_file():
            what = "is a folder" if Path(path).is_dir() else "does not exist"
            raise FileNotFoundError(
                f"sparsekd recommend: {path} {what}; give a file that recommend.save wrote, or sparsekd run, as "
                "runs/NAME/seed0/sparserec-0.1/recommender.safetensors"
            )
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {}).get(_KEY, "null"))
                # Views of the mapped file: nothing is read until it is looked at.
                self._tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
        except (SafetensorError, json.JSONDecodeError, OSError) as error:
            raise ValueError(
                f"sparsekd recommend: {path} is corrupt or cut short ({error}); fetch or write it again"
            ) from error
        named = header.get("format") if isinstance(header, dict) else None
        if named != _FORMAT:
            raise ValueError(
                f"sparsekd recommend: expected a {_FORMAT} file, got {named or 'a file of another program'} in {path}; "
                "sparsekd run sparserec writes recommender.safetensors beside its models"
            )
        if header["version"] > VERSION:
            raise ValueError(
                f"sparsekd recommend: {path} has format version {header['version']}, this sparsekd reads up to "
                f"{VERSION}; upgrade sparsekd"
            )
        self.dim: int = header["dim"]
        self._users, self._items = (_Ids(self._tensors, side, header["text"][side]) for side in ("users", "items"))

    @property
    def num_users(self) -> int:
        return len(self._users)

    @property
    def num_items(self) -> int:
        return len(self._items)

    def best(self, user: str | int, top: int = 20) -> Answer:
        """The best `top` items for the user of this id, as the source of the data writes it; fewer where there are no
        more that the user has not chosen."""
        if top < 1 or top != int(top):
            raise ValueError(f"sparsekd recommend: top must be a whole number from 1 on, got {top}")
        top = min(int(top), self.num_items)
        number = self._users.number(user)
        if number is None:
            return self._popular(top, set(), NOT_KNOWN)
        if not self._tensors["learnt"][number]:
            return self._popular(top, set(self._chosen(number).tolist()), BY_POPULARITY)
        query = ops.embedding(torch.tensor([number]), self._table("users"), self.dim)
        never = (self._tensors["times"] == 0).nonzero().flatten()
        excluded = torch.cat([self._chosen(number), never]).unique()
        begin = torch.tensor([0, len(excluded)])
        scores, items = ops.embedding_top_k(query, self._table("items"), top, (begin, excluded))
        found = items[0] >= 0
        return Answer(self._items.names(items[0][found].tolist()), scores[0][found].float().tolist(), BY_ROWS)

    def _popular(self, top: int, chosen: set[int], rule: str) -> Answer:
        times, order = self._tensors["times"], self._tensors["popular"]
        best = [item for item in order[: top + len(chosen)].tolist() if item not in chosen and times[item] > 0][:top]
        return Answer(self._items.names(best), [float(times[item]) for item in best], rule)

    def _chosen(self, number: int) -> Tensor:
        begin, end = self._tensors["chosen.offsets"][number : number + 2].tolist()
        return self._tensors["chosen.items"][begin:end]

    def _table(self, side: str) -> Table:
        return Table(*(self._tensors[f"{side}.{name}"] for name in _TABLE))


class _Ids:
    """The ids of users or items, in rising order: numbers, or UTF-8 text one after the other."""

    def __init__(self, tensors: dict[str, Tensor], side: str, text: bool) -> None:
        self._ids, self._ends, self._text = tensors[f"{side}.ids"], tensors.get(f"{side}.ends"), text

    def __len__(self) -> int:
        return len(self._ids if self._ends is None else self._ends)

    def __getitem__(self, number: int) -> str | int:
        if self._ends is None:
            return int(self._ids[number])
        begin = int(self._ends[number - 1]) if number else 0
        return bytes(self._ids[begin : int(self._ends[number])].numpy()).decode()

    def number(self, name: str | int) -> int | None:
        """Where an id stands; None where it does not."""
        try:
            wanted: Any = str(name) if self._text else int(name)
        except ValueError:
            return None
        place = bisect_left(cast("Any", self), wanted)
        return place if place < len(self) and self[place] == wanted else None

    def names(self, numbers: list[int]) -> list[str]:
        return [str(self[number]) for number in numbers]


def _of_ids(known: np.ndarray) -> dict[str, Tensor]:
    if np.issubdtype(known.dtype, np.integer):
        return {"ids": torch.from_numpy(known.astype(np.int64))}
    encoded = [str(name).encode() for name in known]
    ends = torch.tensor([len(name) for name in encoded]).cumsum(0)
    return {"ids": torch.frombuffer(bytearray(b"".join(encoded)), dtype=torch.uint8), "ends": ends}


def _check_are_of_task(tables: Mapping[str, SparseEmbedding], train: Pairs) -> None:
    wanted = {"users": len(train.seen_offsets) - 1, "items": train.num_items}
    for side, table in tables.items():
        if table.num_embeddings != wanted[side]:
            raise ValueError(
                f"sparsekd.recommend.save: the task has {wanted[side]} {side}, and the model must have a row for each, "
                f"got {table.num_embeddings}; give the task that it was made for"
            )
        if not bool(torch.isfinite(table.values).all()):
            raise ValueError(
                f"sparsekd.recommend.save: the rows of {side} must be finite, got NaN or infinity; load a checkpoint "
                "from before the divergence"
            )


def _packed(model: Recommender) -> list[SparseEmbedding]:
    kind = next((kind for kind in (MF, LightGCN) if isinstance(model, kind)), None)
    if kind is None or type(model).score_items is not kind.score_items:
        own = "" if kind is None else " with a score_items of its own"
        raise TypeError(
            "sparsekd.recommend.save: expected a model whose score is a product of rows, MF or LightGCN, got "
            f"{type(model).__name__}{own}; serve it from Python, by its score_items"
        )
    if isinstance(model, LightGCN):
        with torch.no_grad():
            rows = model.propagated()
        sides = rows.split([model.num_users, model.num_items])
        return [SparseEmbedding.from_dense(nn.Embedding.from_pretrained(side.cpu())) for side in sides]
    sides = model.tables[0]
    return [side if isinstance(side, SparseEmbedding) else SparseEmbedding.from_dense(side.cpu()) for side in sides]


def _users_of(part: Pairs) -> Tensor:
    """The user of every seen item."""
    counts = part.seen_offsets.diff()
    return torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
