"""Scores of a stream: window by window as Click says, and all rows together without keeping them."""

import pytest
import torch

from sparsekd.goals import Click
from sparsekd.runs.tally import Tally, relative_gap


def windows(count=5, rows=700):
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        logits = 2 * torch.randn(rows, generator=generator) - 1
        yield logits, (torch.rand(rows, generator=generator) < logits.sigmoid()).float()


def test_windows_score_as_click_says_and_together_as_all_their_rows():
    tally, every = Tally(), list(windows())
    for logits, targets in every:
        assert tally.add(logits, targets) == Click().measure(logits, targets)
    whole = Click().measure(torch.cat([w[0] for w in every]), torch.cat([w[1] for w in every]))
    cumulated = tally.cumulated()
    for name in ("normalised_entropy", "log_loss", "calibration"):
        assert cumulated[name] == pytest.approx(whole[name], rel=1e-9)
    assert cumulated["auc"] == pytest.approx(whole["auc"], abs=1e-4)  # bins
    other = Tally()
    other.load_state_dict(tally.state_dict())
    assert other.cumulated() == cumulated


def test_windows_of_one_class_and_before_any_row():
    tally = Tally()
    assert tally.cumulated()["normalised_entropy"] is None and tally.cumulated()["log_loss"] == 0.0
    scores = tally.add(torch.tensor([-1.0, 1.0]), torch.zeros(2))
    assert scores["auc"] is None and scores["calibration"] is None and scores["log_loss"] > 0
    assert tally.add(torch.tensor([20.0, 30.0]), torch.ones(2))["calibration"] == pytest.approx(1.0)
    assert tally.cumulated()["auc"] == 1.0 and tally.rows == 4  # beyond the bins
    with pytest.raises(ValueError, match="targets must be 0 or 1"):
        tally.add(torch.zeros(2), torch.tensor([0.0, 2.0]))


def test_the_gap_is_relative():
    assert relative_gap(0.909, 0.9) == pytest.approx(0.01)
    assert relative_gap(None, 0.9) is None and relative_gap(0.9, None) is None
