"""The plan: what is kept of measured choices, and its file."""

import json

import pytest
import torch

from sparsekd.backends.cuda import choose, masks, plan

from .common import SMALL, TRITON, conv_problem


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


@pytest.mark.parametrize("text", ["[]", '{"device": []}', '{"device": {"problem": {"kernel": "triton"}}}'])
def test_a_file_of_other_contents_is_named(text, tmp_path):
    (tmp_path / "own.json").write_text(text)
    with pytest.raises(RuntimeError, match=r"own\.json is no plan file .*; delete it"):
        plan.Plan("device", tmp_path / "own.json")


def test_choices_of_another_version_are_ignored_and_left_alone(tmp_path):
    """Its tiles have other fields: what is measured anew stands beside them."""
    path, row = tmp_path / "own.json", plan.Measured(TRITON, 1.0, 2.0, {})
    own = plan.Plan("device", path)
    own.measured |= {"old": row, "kept": row}
    own.save()
    stored = json.loads(path.read_text())
    stored["device"]["old"]["tile"]["clusters"] = 2
    path.write_text(json.dumps(stored))
    with pytest.warns(UserWarning, match=r"own\.json holds 1 choices of another version .*, which are ignored"):
        again = plan.Plan("device", path)
    assert again.measured == {"kept": row}
    again.measured["new"] = row
    again.save()
    assert set(json.loads(path.read_text())["device"]) == {"old", "kept", "new"}


def test_of_many_problems_the_last_guesses_are_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(plan, "GUESSES_KEPT", 3)
    own, (problem, _, _) = plan.Plan("device", tmp_path / "own.json"), conv_problem()
    for images in range(1, 9):
        assert own.choose(problem._replace(images=images), lambda: TRITON) == TRITON
        assert 1 <= len(own.guessed) <= 3


def measured_with(results, monkeypatch, tmp_path):
    """What a plan keeps of candidates that return, or raise, these; later ones seem faster."""
    monkeypatch.setattr(
        plan, "medians", lambda calls, *_, **__: {c: 1e-6 * (100 - 10 * i) for i, c in enumerate(calls)}
    )
    own = plan.Plan("device", tmp_path / "own.json")
    others = [plan.Choice("triton", SMALL._replace(stages=stages)) for stages in range(2, 1 + len(results))]
    outcome = dict(zip([plan.DENSE, *others], results, strict=True))

    def run(choice):
        if isinstance(outcome[choice], Exception):
            raise outcome[choice]
        return outcome[choice]

    own.measure(conv_problem()[0], list(outcome), run, torch.device("cpu"))
    (row,) = own.measured.values()
    return own, row, [str(choice) for choice in others]


def test_candidates_that_fail_or_are_wrong_are_dropped_by_name(monkeypatch, tmp_path):
    right, wrong = torch.ones(4), torch.tensor([1.0, 1.0, 1.0, 1.2])
    results = [right, right, wrong, RuntimeError("out of resource: shared memory\nmore"), torch.full((4,), torch.nan)]
    with pytest.warns(UserWarning, match="is left out of forward bfloat16") as warned:
        own, row, names = measured_with(results, monkeypatch, tmp_path)
    assert len(warned) == 3 and set(row.candidates) == {"dense", names[0]} and str(row.choice) == names[0]
    assert row.dropped[names[1]] == "it differs from dense by 0.2 of the largest value"
    assert row.dropped[names[2]] == "RuntimeError: out of resource: shared memory"
    assert "differs from dense" in row.dropped[names[3]]
    own.save()
    assert plan.Plan("device", tmp_path / "own.json").measured == own.measured


def test_dense_that_fails_is_not_hidden(monkeypatch, tmp_path):
    with pytest.raises(RuntimeError, match="out of memory"):
        measured_with([RuntimeError("out of memory"), torch.ones(1)], monkeypatch, tmp_path)


def test_not_a_number_is_right_where_dense_has_it():
    nan = torch.tensor([torch.nan, 1.0])
    assert plan.difference(nan.clone(), nan, 1e-3) == "" and plan.difference(torch.ones(2), nan, 1e-3)
    assert plan.difference(torch.tensor([torch.inf, 1.0]), torch.tensor([torch.inf, 1.0]), 1e-3) == ""


def test_a_free_mask_has_a_key_of_its_own():
    """The same layer and density: rows that keep the same blocks, and rows that keep their own."""
    shared, mask, values = conv_problem(0.25)
    index = torch.rand(4, 36).argsort(1)[:, :9].sort(1).values
    row_ptr, col_idx = torch.arange(0, 37, 9, dtype=torch.int32), index.flatten().int()
    free = masks.Mask(row_ptr, col_idx, shared.weight)
    assert mask.fill == (1.0, pytest.approx(0.5, abs=0.26)) and free.fill[0] < 0.9
    keys = {choose.problem_of("forward", "half", one, values, 128, (14, 14)).key() for one in (mask, free)}
    assert mask.density == free.density and len(keys) == 2
