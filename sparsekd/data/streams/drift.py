"""Clicks whose probabilities are known: a stream that drifts as one wants, and the best that anybody could predict.

The logit of a click is a small network of the numeric features, plus an effect of the user and of the item:

    z = bias + scale * v . relu(W x) + u[user] + i[item]

A *concept* is one (W, v, u, i): it reads its own few of the features. Drift goes from concept to concept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..parts import Period, Rows

KINDS = ("none", "gradual", "abrupt", "recurring")


@dataclass(frozen=True)
class _Concept:
    weight: Tensor  # [hidden, F]
    out: Tensor  # [hidden]
    users: Tensor
    items: Tensor

    def mixed(self, other: _Concept, share: float) -> _Concept:
        """`share` of the other one, at equal energy."""
        a, b = math.cos(share * math.pi / 2), math.sin(share * math.pi / 2)
        pairs = (
            (self.weight, other.weight),
            (self.out, other.out),
            (self.users, other.users),
            (self.items, other.items),
        )
        return _Concept(*(a * mine + b * theirs for mine, theirs in pairs))


class DriftingClicks:
    """A synthetic click stream of `windows` windows with `rows` rows each; window w covers the times w - 1 to w.

    kind      "none"; "gradual": to the next concept within `every` windows, and so on; "abrupt": a new concept after
              every `every` windows; "recurring": two concepts by turns, `every` windows each.
    features  numeric ones; a concept reads `active` of them.
    new_ids   of 100 users, how many are replaced by new ones in every window.
    scale     of the logit: the larger, the better clicks can be predicted.
    """

    def __init__(
        self,
        kind: str = "gradual",
        *,
        windows: int = 40,
        rows: int = 20_000,
        every: int = 10,
        features: int = 64,
        active: int = 16,
        hidden: int = 16,
        users: int = 500,
        items: int = 200,
        new_ids: float = 1.0,
        scale: float = 1.5,
        seed: int = 0,
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"sparsekd.data.DriftingClicks: kind must be one of {', '.join(KINDS)}, got {kind!r}")
        if windows < 1 or rows < 2 or every < 1 or not 1 <= active <= features:
            raise ValueError(
                "sparsekd.data.DriftingClicks: expected at least 1 window of 2 rows, every >= 1 and active features "
                f"among {features}, got windows {windows}, rows {rows}, every {every}, active {active}"
            )
        self.kind, self.windows, self.rows, self.every, self.seed = kind, windows, rows, every, seed
        self.features, self.active, self.hidden, self.scale = features, active, hidden, scale
        self.users, self.items, self.new_ids = users, items, new_ids
        self._number = 0

    @property
    def sizes(self) -> dict[str, int]:
        return {"numeric": self.features, "ids": 2}

    def __len__(self) -> int:
        return self.windows

    def describe(self) -> dict[str, Any]:
        names = (
            "kind",
            "windows",
            "rows",
            "every",
            "features",
            "active",
            "hidden",
            "users",
            "items",
            "new_ids",
            "scale",
        )
        return {"name": f"synthetic-{self.kind}", **{name: getattr(self, name) for name in (*names, "seed")}}

    def state_dict(self) -> dict[str, Any]:
        return {"number": self._number}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._number = state["number"]

    def __iter__(self) -> Iterator[Period]:
        while self._number < self.windows:
            self._number += 1
            inputs, _, clicks = self._drawn(self._number)
            yield Period(Rows(inputs, clicks, None), self._number - 1.0, float(self._number))

    def changes(self) -> list[int]:
        """Windows (from 1) whose concept is another than that of the window before, all at once."""
        if self.kind not in ("abrupt", "recurring"):
            return []
        return list(range(self.every + 1, self.windows + 1, self.every))

    def logits(self, number: int) -> Tensor:
        """The true logits of the rows of a window: the best prediction that there is."""
        return self._drawn(number)[1]

    def optimum(self, number: int) -> float:
        """The normalised entropy that the true probabilities have on a window, in expectation: the mean entropy of a
        click given its features over that of the mean probability."""
        p = self.logits(number).double().sigmoid()
        return float(_entropy(p).mean() / _entropy(p.mean()))

    def _drawn(self, number: int) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
        """Inputs, logits and clicks of a window: the same whenever they are drawn."""
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + 2 * number + 1)
        concept = self._concept_of(number)
        x = torch.randn(self.rows, self.features, generator=generator)
        user = torch.randint(self.users, (self.rows,), generator=generator)
        item = torch.randint(self.items, (self.rows,), generator=generator)
        signal = (x @ concept.weight.T).relu() @ concept.out
        logit = -1.5 + self.scale * signal + 0.3 * concept.users[user] + 0.3 * concept.items[item]
        clicks = (torch.rand(self.rows, generator=generator) < logit.sigmoid()).float()
        # A user who is replaced has the effect of before under a new id.
        turn = int(self.new_ids * self.users / 100 * number)
        ids = torch.stack([user + self.users * ((turn + self.users - 1 - user) // self.users), item], 1)
        return (x, ids), logit, clicks

    def _concept_of(self, number: int) -> _Concept:
        turn, within = divmod(number - 1, self.every)
        if self.kind == "none":
            return self._concept(0)
        if self.kind == "recurring":
            return self._concept(turn % 2)
        if self.kind == "abrupt":
            return self._concept(turn)
        return self._concept(turn).mixed(self._concept(turn + 1), within / self.every)

    def _concept(self, index: int) -> _Concept:
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + 2 * index)
        reads = torch.randperm(self.features, generator=generator)[: self.active]
        weight = torch.zeros(self.hidden, self.features)
        weight[:, reads] = torch.randn(self.hidden, self.active, generator=generator) / math.sqrt(self.active)
        out = torch.randn(self.hidden, generator=generator) / math.sqrt(self.hidden) * 2
        effects = (torch.randn(count, generator=generator) for count in (self.users, self.items))
        return _Concept(weight, out - out.mean(), *effects)


def _entropy(p: Tensor) -> Tensor:
    return -(torch.special.xlogy(p, p) + torch.special.xlogy(1 - p, 1 - p))


def write_csv(stream: DriftingClicks, path: Any) -> None:
    """The stream as a CSV file with the columns user, item, timestamp, label and x0, x1, ..."""
    names = ",".join(["user", "item", "timestamp", "label", *(f"x{place}" for place in range(stream.features))])
    with open(path, "w", encoding="utf-8") as file:
        file.write(names + "\n")
        for number in range(1, stream.windows + 1):
            (x, ids), _, clicks = stream._drawn(number)
            times = number - 1 + np.arange(stream.rows) / stream.rows
            table = np.column_stack([ids.numpy(), times, clicks.numpy(), x.numpy()])
            np.savetxt(file, table, fmt=["%d", "%d", "%.9f", "%d", *["%.6g"] * stream.features], delimiter=",")


__all__ = ["KINDS", "DriftingClicks", "write_csv"]
