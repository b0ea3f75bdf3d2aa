"""Progressive scores of clicks: every window by itself, and all of them together, in bounded memory.

The cumulated metrics are those of all rows so far: sums, and for AUC the counts of clicks and others in bins of the
logit, within which a pair counts one half.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..goals import Click

_BINS, _RANGE = 8_192, 16.0  # of logits from -16 to 16: 1/256 each


class Tally:
    """Sums over the windows of a stream.

    >>> tally = Tally()
    >>> tally.add(torch.tensor([2.0, -2.0]), torch.tensor([1.0, 0.0]))["auc"]
    1.0
    """

    def __init__(self) -> None:
        self.rows, self.clicks, self.predicted, self.log_loss = 0, 0.0, 0.0, 0.0
        self.counts = torch.zeros(2, _BINS, dtype=torch.int64)  # of logits: without a click, and with one

    def add(self, logits: Tensor, targets: Tensor) -> dict[str, float | None]:
        """The metrics of `Click` for the rows of one window: logits [N] and targets [N] of 0 and 1.

        Where all rows are clicks, or none is, normalised entropy and AUC mean nothing and are None; the rows count in
        the sums all the same.  Raises ValueError for other targets.
        """
        logits, targets = logits.double().flatten(), targets.double().flatten()
        if not ((targets == 0) | (targets == 1)).all():
            raise ValueError("sparsekd.Click: targets must be 0 or 1, got others; make them so, or use Regression()")
        clicks, predicted = float(targets.sum()), float(logits.sigmoid().sum())
        log_loss = float(F.binary_cross_entropy_with_logits(logits, targets))
        if 0 < clicks < len(targets):
            scores: dict[str, float | None] = dict(Click().measure(logits, targets))
        else:
            calibration = predicted / clicks if clicks else None
            scores = {"normalised_entropy": None, "log_loss": log_loss, "auc": None, "calibration": calibration}
        self.rows, self.clicks, self.predicted = (
            self.rows + len(targets),
            self.clicks + clicks,
            self.predicted + predicted,
        )
        self.log_loss += log_loss * len(targets)
        bins = ((logits + _RANGE) / (2 * _RANGE) * _BINS).long().clamp(0, _BINS - 1)
        for kind in (0, 1):
            self.counts[kind] += bins[targets == kind].bincount(minlength=_BINS)
        return scores

    def cumulated(self) -> dict[str, float | None]:
        """The same metrics of all rows so far."""
        if not 0 < self.clicks < self.rows:
            return {
                "normalised_entropy": None,
                "log_loss": self.log_loss / max(self.rows, 1),
                "auc": None,
                "calibration": None,
            }
        share, log_loss = self.clicks / self.rows, self.log_loss / self.rows
        entropy = -(share * math.log(share) + (1 - share) * math.log(1 - share))
        others, clicks = self.counts.double()
        below = others.cumsum(0) - others
        auc = float((clicks * (below + others / 2)).sum() / (clicks.sum() * others.sum()))
        return {
            "normalised_entropy": log_loss / entropy,
            "log_loss": log_loss,
            "auc": auc,
            "calibration": self.predicted / self.clicks,
        }

    def state_dict(self) -> dict[str, Any]:
        names = ("rows", "clicks", "predicted", "log_loss")
        return {**{name: getattr(self, name) for name in names}, "counts": self.counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)


def relative_gap(value: float | None, reference: float | None) -> float | None:
    """How much larger than the reference, as a share of it; None where there is nothing to compare."""
    return None if value is None or not reference else value / reference - 1.0


__all__ = ["Tally", "relative_gap"]
