"""Goals against tables written by hand: inputs and answers stand here."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sparsekd import goals, ranks
from sparsekd.goals import Classification, Click, Metric, Ranking, Regression
from sparsekd.losses import kd_loss, kd_regression_loss


class Outputs(nn.Module):
    """Answers every batch with its input; notes in which mode it was asked."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Dropout()
        self.modes = set()

    def forward(self, x):
        self.modes.add((self.training, torch.is_grad_enabled()))
        return x


class Part:
    """Rows whose inputs are the outputs of `Outputs`."""

    def __init__(self, outputs, target):
        self.outputs, self.target = outputs, target

    def batches(self, batch_size):
        for rows in torch.arange(len(self.target)).split(batch_size):
            yield (self.outputs[rows],), self.target[rows]


def scores(goal, outputs, target, batch_size=2):
    return goal.scores(Outputs(), Part(torch.tensor(outputs), torch.tensor(target)), batch_size)


# Metrics


def test_a_metric_knows_its_direction():
    assert Metric("mse", "MSE").better(1.0, 2.0) and not Metric("mse", "MSE").better(2.0, 1.0)
    accuracy = Metric("accuracy", "accuracy %", 100.0, 2, higher_is_better=True)
    assert accuracy.better(0.6, 0.5) and not accuracy.better(0.5, 0.6)
    calibration = Metric("calibration", "calibration", ideal=1.0)
    assert calibration.better(0.9, 1.2) and not calibration.better(1.2, 0.9)
    for metric in (Metric("mse", "MSE"), accuracy, calibration):
        assert not metric.better(0.5, 0.5) and not metric.better(math.nan, 0.5)


@pytest.mark.parametrize(
    ("goal", "name", "judge", "others"),
    [
        (Regression(), "regression", "mse", ["mae"]),
        (Classification(), "classification", "accuracy", ["cross_entropy"]),
        (Click(), "click", "normalised_entropy", ["log_loss", "auc", "calibration"]),
        (Ranking((1, 3)), "ranking", "ndcg@3", ["ndcg@1", "recall@3", "recall@1", "hr@3", "hr@1", "mrr@3", "mrr@1"]),
    ],
)
def test_a_goal_describes_itself_in_json(goal, name, judge, others):
    described = json.loads(json.dumps(goal.describe(), allow_nan=False))
    assert described["name"] == name
    assert [metric["name"] for metric in described["metrics"]] == [judge, *others]
    assert goal.judge == goal.metrics[0]
    for metric, fields in zip(goal.metrics, described["metrics"], strict=True):
        assert Metric(**fields) == metric


def test_descriptions_say_how_a_number_is_shown():
    (accuracy, _) = Classification().describe()["metrics"]
    assert accuracy == {
        "name": "accuracy",
        "heading": "test accuracy %",
        "scale": 100.0,
        "digits": 2,
        "higher_is_better": True,
    }
    assert Click().describe()["metrics"][-1]["ideal"] == 1.0


def test_judges_point_the_right_way():
    up = {goal.name: goal.judge.higher_is_better for goal in (Regression(), Classification(), Click(), Ranking())}
    assert up == {"regression": False, "classification": True, "click": False, "ranking": True}


# Predictions


def test_predictions_are_float32_in_evaluation_mode_and_leave_every_mode_as_it_was():
    model = Outputs().train()
    model.inner.eval()
    x = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    prediction = goals.predict(model, Part(x, x), batch_size=2)
    assert prediction.dtype == torch.float32 and prediction.tolist() == [1, 2, 3]
    assert model.modes == {(False, False)}
    assert model.training and not model.inner.training


def test_a_model_that_keeps_what_it_computes_trains_after_it_was_scored():
    class Cached(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.table = nn.Parameter(torch.ones(2)), None

        def forward(self, x):
            self.table = torch.arange(2.0) + 1 if self.table is None else self.table
            return x * self.scale * self.table

    model, x = Cached(), torch.tensor([1.0, 2.0])
    assert Regression().scores(model, Part(x, x)) == {"mse": 2.0, "mae": 1.0}
    model(x).sum().backward()
    assert model.scale.grad.tolist() == [1.0, 4.0]


# Regression


def test_regression_loss_and_imitation():
    goal = Regression()
    output = torch.tensor([1.0, 2.0], requires_grad=True)
    loss = goal.loss(output, torch.tensor([3, 5]))
    loss.backward()
    assert loss.item() == 6.5 and output.grad.tolist() == [-2.0, -3.0]
    teacher = torch.tensor([0.0, 4.0])
    assert goal.imitation(output, teacher, 9.0).item() == kd_regression_loss(output, teacher).item() == 2.5
    assert goal.loss(torch.ones(2, dtype=torch.bfloat16), torch.zeros(2)).dtype == torch.float32


def test_regression_scores_clip_to_the_range():
    got = scores(Regression((1.0, 5.0)), [0.0, 2.0, 7.0], [1.0, 4.0, 4.0])
    assert got == {"mse": (0 + 4 + 1) / 3, "mae": 1.0}
    assert scores(Regression(), [0.0, 2.0, 7.0], [1.0, 4.0, 4.0]) == {"mse": (1 + 4 + 9) / 3, "mae": 2.0}


def test_regression_refuses_what_would_broadcast_and_empty_ranges():
    with pytest.raises(ValueError, match=r"got output \(2, 1\) and target \(2,\); squeeze"):
        Regression().loss(torch.zeros(2, 1), torch.zeros(2))
    with pytest.raises(ValueError, match=r"got output \(3, 1\) and target \(3,\)"):
        scores(Regression(), [[0.0], [2.0], [7.0]], [1.0, 4.0, 4.0])
    for wrong in ((5.0, 1.0), (math.nan, 1.0)):
        with pytest.raises(ValueError, match="target_range must be"):
            Regression(wrong)


# Classification


def test_classification_loss_and_imitation():
    logits = torch.tensor([[math.log(3), 0.0], [0.0, 0.0]])
    goal = Classification()
    torch.testing.assert_close(
        goal.loss(logits, torch.tensor([0, 1])), torch.tensor((math.log(4 / 3) + math.log(2)) / 2)
    )
    teacher = torch.tensor([[1.0, 2.0], [0.0, -1.0]])
    assert torch.equal(goal.imitation(logits, teacher, 3.0), kd_loss(logits, teacher, 3.0))


def test_classification_scores():
    rows = [[2.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 5.0], [1.0, 0.0, 0.0]]
    got = scores(Classification(), rows, [0, 1, 0, 0])
    assert got["accuracy"] == 0.75
    each = [
        math.log(math.exp(2) + 2) - 2,
        math.log(math.e + 2) - 1,
        math.log(math.exp(5) + 2),
        math.log(math.e + 2) - 1,
    ]
    assert got["cross_entropy"] == pytest.approx(sum(each) / 4, rel=1e-6)


# Click


def logit(p):
    return math.log(p / (1 - p))


def test_click_scores_of_a_hand_made_table():
    """Five rows: two clicks. Of the six pairs (click, none) four are in order, one is a tie, one is not."""
    probabilities, clicks = [0.8, 0.4, 0.4, 0.6, 0.2], [1.0, 1.0, 0.0, 0.0, 0.0]
    got = scores(Click(), [logit(p) for p in probabilities], clicks)
    log_loss = -(math.log(0.8) + math.log(0.4) + math.log(0.6) + math.log(0.4) + math.log(0.8)) / 5
    entropy = -(0.4 * math.log(0.4) + 0.6 * math.log(0.6))
    assert got == pytest.approx(
        {
            "normalised_entropy": log_loss / entropy,
            "log_loss": log_loss,
            "auc": (4 + 0.5) / 6,
            "calibration": (0.8 + 0.4 + 0.4 + 0.6 + 0.2) / 2,
        },
        rel=1e-6,
    )


def test_the_share_of_clicks_as_prediction_has_entropy_one_and_auc_one_half():
    got = scores(Click(), [logit(0.25)] * 4, [0, 1, 0, 0])
    assert got["normalised_entropy"] == pytest.approx(1) and got["calibration"] == pytest.approx(1)
    assert got["auc"] == 0.5


@pytest.mark.parametrize(("order", "auc"), [([3.0, 2.0, 1.0, 0.0], 1.0), ([0.0, 1.0, 2.0, 3.0], 0.0)])
def test_auc_at_its_ends(order, auc):
    assert scores(Click(), order, [1, 1, 0, 0])["auc"] == auc


def test_auc_is_the_plain_double_loop():
    score, target = torch.randint(0, 6, (60,)).float(), torch.randint(0, 2, (60,))
    positive, negative = score[target == 1].tolist(), score[target == 0].tolist()
    wins = sum((p > n) + (p == n) / 2 for p in positive for n in negative)
    got = Click().measure(score, target)
    assert got["auc"] == pytest.approx(wins / (len(positive) * len(negative)), rel=1e-12)


def test_click_loss_and_imitation():
    goal = Click()
    torch.testing.assert_close(
        goal.loss(torch.tensor([logit(0.8), logit(0.4)]), torch.tensor([1, 0])),
        torch.tensor(-(math.log(0.8) + math.log(0.6)) / 2),
    )
    temperature = 2.0
    student, teacher = torch.tensor([0.5, -1.0], requires_grad=True), torch.tensor([2.0, -3.0])
    want = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        p, q = 1 / (1 + math.exp(-t / temperature)), 1 / (1 + math.exp(-s / temperature))
        want += (p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))) * temperature**2 / 2
    loss = goal.imitation(student, teacher, temperature)
    assert loss.item() == pytest.approx(want, rel=1e-5)
    loss.backward()
    assert student.grad[0] < 0 < student.grad[1]  # towards the teacher


def test_click_refuses_what_its_metrics_cannot_judge():
    for clicks in ([0, 0], [1, 1]):
        with pytest.raises(ValueError, match=r"rows with and without a click, got \d clicks in 2 rows; take a larger"):
            scores(Click(), [0.0, 1.0], clicks)
    with pytest.raises(ValueError, match="targets must be 0 or 1"):
        scores(Click(), [0.0, 1.0], [0.0, 0.5])
    with pytest.raises(ValueError, match=r"got output \(2, 1\) and target \(2,\)"):
        Click().loss(torch.zeros(2, 1), torch.zeros(2))
    with pytest.raises(ValueError, match=r"Click.imitation: .* same shape"):
        Click().imitation(torch.zeros(2), torch.zeros(3), 4.0)


# Ranking


class Table(nn.Module):
    """Scores of all items that stand in a table [users, items]."""

    def __init__(self, rows):
        super().__init__()
        self.table = nn.Parameter(torch.tensor(rows))
        self.blocks = []

    def score_items(self, users):
        self.blocks.append(users.tolist())
        return self.table[users]


def held_out(pairs, seen, num_items):
    """A part of (user, item) pairs; `seen` has a list of items for each user."""
    users, items = torch.tensor(pairs).T
    lengths = torch.tensor([0, *map(len, seen)])
    flat = torch.tensor([item for row in seen for item in row], dtype=torch.int64)
    return SimpleNamespace(
        users=users, items=items, num_items=num_items, seen_offsets=lengths.cumsum(0), seen_items=flat
    )


RANKED = [
    # items  0    1    2    3    4
    [0.9, 0.8, 0.7, 0.6, 0.5],  # has seen 0: the order is 1 2 3 4
    [0.0, 0.0, 0.0, 0.0, 1.0],  # has seen nothing; ties of 0..3 stay in order: 4 0 1 2 3
    [0.1, 0.2, 0.3, 0.4, 0.5],  # is not in the part
    [-5.0, -4.0, -3.0, -2.0, -1.0],  # has seen 4, 3, 2: the order is 1 0
]
SEEN = [[0], [], [1], [2, 3, 4]]
PAIRS = [(3, 0), (0, 4), (0, 2), (1, 1), (1, 1)]  # one of them twice


@pytest.mark.parametrize("batch_size", [1, 2, 512])
def test_ranking_scores_of_a_hand_made_table(batch_size):
    model = Table(RANKED)
    got = Ranking((1, 2, 3)).scores(model, held_out(PAIRS, SEEN, 5), batch_size)
    second, third = 1 / math.log2(3), 1 / math.log2(4)
    # User 0 holds out 2 and 4, at ranks 2 and 4; user 1 holds out 1, at rank 3; user 3 holds out 0, at rank 2.
    assert got == pytest.approx(
        {
            "recall@1": 0.0,
            "recall@2": (0.5 + 0 + 1) / 3,
            "recall@3": (0.5 + 1 + 1) / 3,
            "ndcg@1": 0.0,
            "ndcg@2": ((second / (1 + second)) + 0 + second) / 3,
            "ndcg@3": ((second / (1 + second)) + third + second) / 3,
            "hr@1": 0.0,
            "hr@2": 2 / 3,
            "hr@3": 1.0,
            "mrr@1": 0.0,
            "mrr@2": (1 / 2 + 0 + 1 / 2) / 3,
            "mrr@3": (1 / 2 + 1 / 3 + 1 / 2) / 3,
        }
    )
    assert [user for block in model.blocks for user in block] == [0, 1, 3]
    assert max(map(len, model.blocks)) == min(batch_size, 3)
    assert model.table.tolist() == torch.tensor(RANKED).tolist()  # seen items are struck out in a copy


def test_ties_are_broken_by_item_number():
    part = held_out([(0, 2)], [[]], 40)
    model = Table([[0.5] * 40])
    got = Ranking((2, 3)).scores(model, part)
    assert (got["recall@2"], got["recall@3"]) == (0.0, 1.0)


def test_fewer_items_than_the_cutoff():
    got = Ranking().scores(Table(RANKED), held_out(PAIRS, SEEN, 5))
    assert got["recall@20"] == 1.0 and got["ndcg@20"] < 1.0


def test_a_perfect_order_has_ndcg_one():
    got = Ranking((1, 3)).scores(Table([[3.0, 2.0, 1.0, 0.0]]), held_out([(0, 0), (0, 1)], [[3]], 4))
    alone = {"ndcg@3": 1.0, "ndcg@1": 1.0, "recall@3": 1.0, "recall@1": 0.5}
    assert got == {**alone, **dict.fromkeys(("hr@3", "hr@1", "mrr@3", "mrr@1"), 1.0)}


@pytest.mark.parametrize("count", [1, 3, 20, 50])
def test_the_best_come_as_a_stable_sort_has_them(count):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 12, (40, 30), generator=generator).float()  # ties at every rank
    scores[0] = 0.0
    seen = torch.tensor([1, 1, 5]), torch.tensor([3, 29, 0])
    struck = scores.clone()
    struck[seen] = -math.inf
    want = struck.sort(dim=1, descending=True, stable=True).indices[:, :count]
    assert torch.equal(ranks.best_first(scores, seen, count), want)


def test_bpr_loss():
    items = torch.tensor([1.0, 0.0], requires_grad=True)
    negatives = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    margins = [1.0, 0.0, -2.0, 0.0]
    want = sum(math.log(1 + math.exp(-margin)) for margin in margins) / 4
    loss = Ranking().loss((items, negatives), torch.empty(2, 0))
    assert loss.item() == pytest.approx(want, rel=1e-6)
    loss.backward()
    assert (items.grad < 0).all()  # a larger score of the item lowers the loss


def test_ranking_imitation_is_kd_over_the_candidates():
    student = torch.tensor([1.0, 0.0], requires_grad=True), torch.tensor([[0.0], [2.0]])
    teacher = torch.tensor([3.0, 1.0], requires_grad=True), torch.tensor([[0.0], [1.0]])
    loss = Ranking().imitation(student, teacher, 2.0)
    want = 0.0
    for s, t in ((1.0, 3.0), (-2.0, 0.0)):  # with one negative: margins through a sigmoid
        p, q = 1 / (1 + math.exp(-t / 2)), 1 / (1 + math.exp(-s / 2))
        want += (p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))) * 4 / 2
    assert loss.item() == pytest.approx(want, rel=1e-5)
    loss.backward()
    assert student[0].grad.abs().min() > 0 and teacher[0].grad is None


def test_ranking_refuses_bad_input():
    goal, part = Ranking(), held_out(PAIRS, SEEN, 5)
    with pytest.raises(TypeError, match=r"Outputs must have a method score_items\(users \[U\]\)"):
        goal.scores(Outputs(), part)
    with pytest.raises(ValueError, match=r"must return finite \(3, 5\), got \(3, 4\)"):
        goal.scores(Table([row[:4] for row in RANKED]), part)
    with pytest.raises(ValueError, match=r"must return finite \(3, 5\), got others than finite numbers"):
        goal.scores(Table([[math.nan] * 5] * 4), part)
    with pytest.raises(ValueError, match="item 3 of user 3 is held out, but seen before as well"):
        goal.scores(Table(RANKED), held_out([(0, 1), (3, 3)], SEEN, 5))
    with pytest.raises(ValueError, match="at least one pair, got none"):
        goal.scores(Table(RANKED), SimpleNamespace(**{**vars(part), "users": part.users[:0], "items": part.items[:0]}))
    with pytest.raises(TypeError, match=r"must return \(scores of items \[B\], .* got Tensor"):
        goal.loss(torch.zeros(2, 2), torch.empty(2, 0))
    with pytest.raises(ValueError, match=r"got \(2,\) and \(2,\); squeeze or unsqueeze"):
        goal.loss((torch.zeros(2), torch.zeros(2)), torch.empty(2, 0))
    for wrong in ((), (0, 5), (5, 5), (10, 5)):
        with pytest.raises(ValueError, match="cutoffs must rise from 1 or more"):
            Ranking(wrong)
