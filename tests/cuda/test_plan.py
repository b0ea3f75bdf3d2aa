"""The plan: what is kept of measured choices, and its file."""

import json

import pytest
import torch

from sparsekd.backends.cuda import plan

from .common import TRITON, conv_problem


def test_measured_choices_are_kept_and_read_back(monkeypatch, tmp_path):
    problem, _, _ = conv_problem()
    microseconds = {"dense": 100.0, str(TRITON): 60.0}
    monkeypatch.setattr(plan, "medians", lambda calls, *_, **__: {c: 1e-6 * microseconds[str(c)] for c in calls})
    own = plan.Plan("device", tmp_path / "own.json")
    assert own.measure(problem, [plan.DENSE, TRITON], lambda choice: torch.ones(2), torch.device("cpu")) == TRITON
    own.save()
    again = plan.Plan("device", tmp_path / "own.json")
    assert again.choose(problem, guess=lambda: pytest.fail("was measured")) == TRITON
    assert again.measured == own.measured
    assert plan.Plan("another device", tmp_path / "own.json").measured == {}


@pytest.mark.parametrize(("sparse", "chosen"), [(99.0, plan.DENSE), (97.0, TRITON)])
def test_dense_is_left_only_for_a_real_gain(sparse, chosen, monkeypatch, tmp_path):
    monkeypatch.setattr(plan, "medians", lambda calls, *_, **__: dict(zip(calls, (1e-4, 1e-6 * sparse), strict=True)))
    own = plan.Plan("device", tmp_path / "own.json")
    assert (
        own.measure(conv_problem()[0], [plan.DENSE, TRITON], lambda choice: torch.ones(2), torch.device("cpu"))
        == chosen
    )


def test_two_plans_may_write_one_file(tmp_path):
    path, row = tmp_path / "own.json", plan.Measured(TRITON, 1.0, 2.0, {})
    for device in ("one", "two"):
        own = plan.Plan(device, path)
        own.measured["problem"] = row
        own.save()
    assert set(json.loads(path.read_text())) == {"one", "two"}


def test_a_broken_plan_file_is_named(tmp_path):
    (tmp_path / "own.json").write_text("{")
    with pytest.raises(RuntimeError, match=r"own\.json is no plan file .*; delete it"):
        plan.Plan("device", tmp_path / "own.json")
