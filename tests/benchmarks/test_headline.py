"""The headline benchmark: its plain side computes the loss that ours does, and its table chooses on validation."""

import dataclasses
import json
import math

import pytest
import torch
from torch import nn

from benchmarks import headline
from benchmarks.lib import plain_sad
from benchmarks.lib.floor import floor_of
from benchmarks.lib.plain_sad import PlainSAD
from sparsekd import SAD
from sparsekd.backends import cpu
from sparsekd.runs import RunConfig
from sparsekd.runs.plans import ratings

from ..runs import made_up


def same_parameters(sad, plain):
    """Give the plain module the parameters of ours, which holds those of all layers side by side."""
    for ours, theirs in ((sad.queries, plain.queries), (sad.keys, plain.keys)):
        weights = [weight for run in ours.weights for weight in run]
        for place, (layer, weight) in enumerate(zip(theirs, weights, strict=True)):
            layer[0].weight.copy_(weight.T)
            layer[0].bias.copy_(ours.bias[place, 0])
    plain.bilinear.load_state_dict(sad.bilinear.state_dict())
    plain.teacher_position.copy_(sad.teacher_position)
    plain.student_position.copy_(sad.student_position)


def test_the_plain_loss_is_ours():
    torch.manual_seed(0)
    teacher = [torch.rand(6, 8, 8, 8), torch.rand(6, 8, 8, 8), torch.rand(6, 12, 4, 4)]
    student = [torch.rand(6, 4, 8, 8, requires_grad=True), torch.rand(6, 6, 4, 4, requires_grad=True)]
    sad, plain = SAD([8, 8, 12], [4, 6], 16), PlainSAD([8, 8, 12], [4, 6], 16)
    with torch.no_grad():
        same_parameters(sad, plain)
    gradients = []
    for loss in (sad(teacher, student), plain(teacher, student)):
        gradients.append((loss.detach(), *torch.autograd.grad(loss, student)))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-7)


def test_plain_torch_takes_as_many_passes(monkeypatch):
    passes = []
    monkeypatch.setattr(plain_sad, "recalibrate", lambda *args: passes.append(1))
    task = made_up.make_task()
    net = made_up.network(epochs=4)
    for splits, count in ((1, 4), (2, 2)):
        passes.clear()
        halved = dataclasses.replace(net, recipe=dataclasses.replace(net.recipe, splits=splits))
        state, error = plain_sad.train(task, halved, made_up.teacher_of(task), made_up.student_of(task), 0)
        assert len(passes) == count and state and math.isfinite(error)


def row(job, seconds, val, test, turn=0, elsewhere=0.0, seed=0):
    measured = {"seconds": seconds, "train_seconds": seconds / 2, "val_mse": val, "test_mse": test}
    measured["elsewhere"] = elsewhere
    return {"job": job, "seed": seed, "turn": turn, "wall_seconds": seconds + 5, **measured}


def test_the_table_chooses_densities_on_validation_and_counts_turns(tmp_path, capsys):
    rows = [
        row(headline.PLAIN, 80, 2.0, 2.5),
        row(headline.PLAIN, 90, 2.0, 2.5, 1),
        row(headline.PLAIN, 100, 2.0, 2.5, 2),
    ]
    rows += [row("LTH-SAD @ 0.3", 30, 1.9, 2.6), row("LTH-SAD @ 0.1", 20, 2.1, 2.4)]
    rows += [row("SAD", 40, 2.0, 2.5, elsewhere=0.2), row("SAD", 36, 2.0, 2.5, 1, elsewhere=0.04)]
    rows += [row("SP-SAD @ 0.1", 45, 2.0, 2.5, elsewhere=0.2)]
    (tmp_path / headline.ROWS).write_text("".join(json.dumps({**each, "recipe": "ours"}) + "\n" for each in rows))
    options = type("Options", (), {"out": str(tmp_path), "json": None, "task": "movietweetings", "recipe": "ours"})
    headline.table(options)
    said = capsys.readouterr().out
    assert f"| **{headline.PLAIN}** | 90.0 | 1.00 | 2.0000 | 2.5000 | 3 |" in said
    assert "| **LTH-SAD @ 0.3** | 30.0 | 0.33 | 1.9000 | 2.6000 | 1 |" in said
    assert "| LTH-SAD @ 0.1 | 20.0 | 0.22 |" in said
    assert "| **SAD** | 36.0 | 0.40 |" in said and "| **SP-SAD @ 0.1** | 45.0 | 0.50 |" in said
    assert headline.expected(rows, "LTH-SAD @ 0.1") == 25 and headline.expected(rows, "new") == 105
    assert headline.expected([], "new") == 0.0 and math.isfinite(headline.expected(rows, headline.PLAIN))


def test_ratios_are_to_plain_torch_of_the_same_seed():
    rows = [row(headline.PLAIN, 100, 2.0, 2.5), row("SAD", 50, 2.0, 2.5)]
    rows += [row(headline.PLAIN, 200, 2.0, 2.5, seed=1), row("SAD", 120, 2.2, 2.7, seed=1)]
    plain, sad = headline.summary(rows)
    assert plain["ratio"] == 1 and sad["ratio"] == pytest.approx((0.5 + 0.6) / 2) and sad["seconds"] == 85
    assert sad["seeds"] == 2 and sad["test_mse"] == pytest.approx(2.6)
    assert sad["test_mse_deviation"] == pytest.approx(0.2 / 2**0.5) and plain["test_mse_deviation"] == 0


def test_rows_of_another_task_or_without_plain_torch_are_refused(tmp_path):
    (tmp_path / headline.ROWS).write_text(json.dumps(row(headline.PLAIN, 100, 2.0, 2.5)) + "\n")
    options = type("Options", (), {"out": str(tmp_path), "json": None, "task": "movies-social", "recipe": "ours"})
    with pytest.raises(ValueError, match=r"rows of movietweetings, got --task movies-social; take another --out"):
        headline.table(options)
    options.task = "movietweetings"
    with pytest.raises(ValueError, match=r"rows of long, got --recipe ours; take another --out"):  # they do not say
        headline.table(options)
    rows = [row(headline.PLAIN, 100, 2.0, 2.5), row("SAD", 50, 2.0, 2.5), row("SAD", 60, 2.0, 2.5, seed=2)]
    with pytest.raises(ValueError, match=r"plain torch has not run with seed 2, .* run --seed 2 --jobs 'plain torch'"):
        headline.summary(rows)


def test_jobs_are_named_after_what_judges_their_students():
    config = RunConfig(methods=("sp-sad", "ss-sad"), densities=(0.1,))
    jobs = headline.networks_of(ratings.in_one_plan(config, ratings.MOVIETWEETINGS, lambda shape: None))
    scores = ("snip", "taylor", "fisher")
    usual = ["SP-SAD @ 0.1", "SS-SAD @ 0.1", "SP-SAD at once @ 0.1", "SS-SAD at once @ 0.1"]
    assert list(jobs) == [headline.PLAIN, "SAD", *usual, *(f"SP-SAD at once by {score} @ 0.1" for score in scores)]
    assert "first_score" not in jobs["SS-SAD at once @ 0.1"].options


@pytest.mark.skipif(cpu.native is None, reason=f"no compiled kernels: {cpu.missing}")
def test_a_floor_counts_three_products_and_five_maps_of_every_layer():
    layers = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 5))
    least = floor_of(layers, (torch.randn(4, 3, 6, 6),))
    assert least.macs == 3 * 4 * (36 * 16 * 27 + 16 * 36 * 5)
    assert least.bytes == 4 * 4 * (3 * 3 * 36 + 2 * 16 * 36 + 3 * 16 * 36 + 2 * 5)
    assert least.arithmetic_ms == pytest.approx(2e-6 * least.macs / least.gflops) and least.gflops > 0
    assert least.traffic_ms == pytest.approx(1e-6 * least.bytes / least.gigabytes_a_second)
