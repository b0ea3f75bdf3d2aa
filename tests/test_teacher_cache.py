"""TeacherCache: its losses are those of a teacher that is run, and files that do not fit are refused."""

import copy
import doctest
import importlib
import itertools

import pytest
import torch
from torch import nn

import sparsekd
from sparsekd import SAD, Classification, Distiller, Ranking, Regression, TeacherCache
from sparsekd.distill import Custom, Plain
from sparsekd.losses import AttentionTransfer

from .tapped import hooks, network
from .test_features import LAYERS

TAPS = ["0.2", "1.2"]
ROWS = 12


def images():
    torch.manual_seed(0)
    return torch.randn(ROWS, 3, 8, 8), torch.arange(ROWS) % 5


def pair():
    torch.manual_seed(1)
    return network(6), network(4)


def filled(teacher, x, taps=TAPS, **options):
    cache = TeacherCache(teacher, taps, rows=len(x), example_inputs=(x[:2],), **options)
    for rows in torch.arange(len(x)).split(5):
        cache.add(rows, (x[rows],))
    return cache


def both(distiller, inputs, target, taught):
    """(losses, gradients of the student) by the teacher that is run, and by what was kept of it."""
    results = []
    state = copy.deepcopy(distiller.state_dict())
    for extra in ((), (taught,)):
        distiller.load_state_dict(state)  # the running statistics of the meta-network
        distiller.student.zero_grad()
        losses = distiller.loss(inputs, target, *extra)
        losses.total.backward()
        results.append((losses.terms(), [parameter.grad.clone() for parameter in distiller.student.parameters()]))
    return results


MATCHINGS = {"sad": lambda: None, "attention transfer": AttentionTransfer}
GOALS = {
    "classification": Classification(),
    "regression": Regression(),
    "any loss": Custom(nn.MSELoss(), lambda student, teacher: (student - teacher).abs().mean()),
}


@pytest.mark.parametrize("matching", MATCHINGS.values(), ids=list(MATCHINGS))
@pytest.mark.parametrize("goal", GOALS.values(), ids=list(GOALS))
def test_the_losses_are_those_of_the_teacher_that_is_run(goal, matching):
    x, labels = images()
    target = labels if isinstance(goal, Classification) else torch.randn(ROWS, 5)
    teacher, student = pair()
    if matching() is not None:
        student = network(6)
    options = {"goal": goal, "example_inputs": (x[:2],), "alpha": 0.7, "beta": 30.0, "dim": 8}
    distiller = Distiller(teacher, student, TAPS, TAPS, **options, matching=matching())
    rows = torch.tensor([7, 0, 3, 11])
    run, kept = both(distiller, (x[rows],), target[rows], filled(teacher, x)[rows])
    torch.testing.assert_close(kept, run)
    assert run[0]["kd"] > 0 and run[0]["sad"] > 0


@pytest.mark.parametrize("matching", MATCHINGS.values(), ids=list(MATCHINGS))
@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda value: str(value)[:12])
def test_features_of_any_rank_are_kept(layer, shape, matching):
    torch.manual_seed(0)
    x = torch.randn(ROWS, *shape[1:])
    teacher = nn.Sequential(copy.deepcopy(layer), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))
    teacher(x)
    student = copy.deepcopy(teacher)
    nn.init.normal_(student[0].weight)
    options = {"goal": Regression(), "example_inputs": (x[:2],), "dim": 8}
    distiller = Distiller(teacher, student, ["1"], ["1"], **options, matching=matching())
    rows = torch.tensor([3, 2, 9])
    run, kept = both(distiller, (x[rows],), torch.randn(3, 3), filled(teacher, x, ["1"])[rows])
    torch.testing.assert_close(kept, run)


def test_volumes_meet_students_of_any_depth():
    """They are kept at their full depth: to which one they are pooled depends on the student."""
    torch.manual_seed(0)
    x = torch.randn(ROWS, 2, 6, 3, 4)

    def volumes(stride):
        return nn.Sequential(nn.Conv3d(2, 4, 1, (stride, 1, 1)), nn.ReLU(), nn.Flatten(), nn.Linear(288 // stride, 3))

    teacher = volumes(1)
    cache, rows = filled(teacher, x, ["1"]), torch.tensor([5, 1, 8])
    for stride in (1, 2, 3):
        options = {"goal": Regression(), "example_inputs": (x[:2],), "dim": 8, "alpha": 0.0}
        distiller = Distiller(teacher, volumes(stride), ["1"], ["1"], **options)
        run, kept = both(distiller, (x[rows],), torch.randn(3, 3), cache[rows])
        torch.testing.assert_close(kept, run)


def test_one_cache_serves_distillers_of_some_of_its_taps_in_any_order():
    x, labels = images()
    teacher, student = pair()
    cache = filled(teacher, x)
    for taps in (TAPS[::-1], TAPS[1:], TAPS[:1]):
        options = {"goal": Classification(), "example_inputs": (x[:2],), "dim": 8}
        distiller = Distiller(teacher, student, taps, TAPS, **options)
        run, kept = both(distiller, (x[:4],), labels[:4], cache[torch.arange(4)])
        torch.testing.assert_close(kept, run)
    only_kd = Distiller(teacher, student, (), (), goal=Classification(), beta=0.0)
    run, kept = both(only_kd, (x[:4],), labels[:4], filled(teacher, x, ())[torch.arange(4)])
    torch.testing.assert_close(kept, run)
    with pytest.raises(ValueError, match=r"expected what the teacher's 0.2 return, got a TeacherCache of 1.2"):
        distiller.loss((x[:4],), labels[:4], filled(teacher, x, ["1.2"])[torch.arange(4)])


def test_the_teacher_is_run_once_a_row_and_left_as_it_was():
    x, labels = images()
    teacher, student = pair()
    teacher.train()
    teacher[1].eval()
    modes, state = [m.training for m in teacher.modules()], copy.deepcopy(teacher.state_dict())
    cache = filled(teacher, x)
    assert [m.training for m in teacher.modules()] == modes and hooks(teacher) == 0
    torch.testing.assert_close(teacher.state_dict(), state, rtol=0, atol=0)
    options = {"goal": Classification(), "example_inputs": (x[:2],), "dim": 8}
    method = sparsekd.LTHSAD(
        Distiller(teacher, student, TAPS, TAPS, **options), sparsekd.LinearSchedule(0.3, 1, 0.3), epochs=2
    )

    def refuse(*args):
        raise AssertionError("the teacher was not to run")

    teacher.forward = refuse
    cache.add(torch.arange(ROWS), (x,))  # all of it is there
    assert torch.isfinite(method.loss((x[:4],), labels[:4], cache[torch.arange(4)]).total)
    assert torch.isfinite(Plain(student, Classification()).loss((x[:4],), labels[:4], cache[torch.arange(4)]).total)


def test_views_of_a_row_are_kept_apart():
    x, _ = images()
    teacher, _ = pair()
    cache = TeacherCache(teacher, TAPS, rows=ROWS, views=2, example_inputs=(x[:2],))
    rows = torch.arange(ROWS)
    cache.add(rows, (x,), view=0)
    assert cache.holds(rows) and not cache.holds(rows, view=1)
    with pytest.raises(ValueError, match=r"row 3 in view 1 has not been added; .* cache.add\(rows, inputs\)"):
        cache[torch.tensor([3]), 1]
    cache.add(rows, (x.flip(3),), view=1)
    straight, mirrored = filled(teacher, x), filled(teacher, x.flip(3))
    some, views = torch.tensor([4, 9, 4]), torch.tensor([1, 0, 0])
    mixed = cache[some, views]
    for place, (row, view) in enumerate(zip(some.tolist(), views.tolist(), strict=True)):
        want = (straight, mirrored)[view][torch.tensor([row])]
        for got, one in ((mixed.output, want.output), *zip(mixed.stats[:2], want.stats[:2], strict=True)):
            torch.testing.assert_close(got[place : place + 1], one)


def test_what_it_takes_is_known_before_it_is_spent(tmp_path):
    x, _ = images()
    teacher, _ = pair()
    cache = TeacherCache(teacher, TAPS, rows=ROWS, example_inputs=(x[:2],), path=tmp_path / "a" / "teacher.cache")
    # A byte to say that a row is there; 5 logits, 6 + 12 channels and 64 + 16 positions in float32.
    assert cache.num_bytes == ROWS * (1 + 4 * (5 + 18 + 80)) and f"{cache.num_bytes} bytes" in repr(cache)
    assert not (tmp_path / "a").exists()
    with pytest.raises(ValueError, match=r"12 rows in 3 views take 14868 bytes, 413 each, and max_bytes is 14867; tap"):
        TeacherCache(teacher, TAPS, rows=ROWS, views=3, example_inputs=(x[:2],), max_bytes=14867)
    cache.add(torch.arange(2), (x[:2],))
    header = 4096
    assert cache.num_bytes <= (tmp_path / "a" / "teacher.cache").stat().st_size <= cache.num_bytes + header


def test_a_file_is_taken_up_where_it_was_left(tmp_path):
    x, _ = images()
    teacher, _ = pair()
    options = {"rows": ROWS, "example_inputs": (x[:2],), "path": tmp_path / "teacher.cache"}
    first = TeacherCache(teacher, TAPS, **options)
    first.add(torch.arange(8), (x[:8],))
    again = TeacherCache(teacher, TAPS, **options)
    assert again.holds(torch.arange(8)) and not again.holds(torch.arange(9))
    again.add(torch.arange(8, ROWS), (x[8:],))
    rows, memory = torch.randperm(ROWS), filled(teacher, x)
    torch.testing.assert_close(again[rows].stats[:2], memory[rows].stats[:2])
    torch.testing.assert_close(again[rows].output, memory[rows].output)
    assert first.holds(torch.arange(ROWS))  # one file, mapped twice


def write_over(path, begin, data):
    with path.open("r+b") as file:
        file.seek(begin)
        file.write(data)


DAMAGES = {
    "another file": (lambda path: path.write_bytes(b"PK" * 300), "is no file of a TeacherCache"),
    "an empty file": (lambda path: path.write_bytes(b""), "is no file of a TeacherCache"),
    "cut short": (lambda path: path.write_bytes(path.read_bytes()[:-9]), r"is damaged: expected \d+ bytes, got \d+"),
    "cut in the header": (lambda path: path.write_bytes(path.read_bytes()[:40]), "the header of .* is damaged"),
    "a length of nonsense": (lambda path: write_over(path, 16, b"\xff" * 8), "the header of .* is damaged"),
    "another digit": (lambda path: write_over(path, 60, b"7"), "the header of .* is damaged"),
}


@pytest.mark.parametrize(("damage", "says"), DAMAGES.values(), ids=list(DAMAGES))
def test_damaged_and_foreign_files_are_refused(damage, says, tmp_path):
    x, _ = images()
    teacher, _ = pair()
    path = tmp_path / "teacher.cache"
    filled(teacher, x, path=path)
    damage(path)
    with pytest.raises(ValueError, match=says):
        filled(teacher, x, path=path)


def test_a_file_of_something_else_is_refused(tmp_path):
    x, _ = images()
    teacher, _ = pair()
    path = tmp_path / "teacher.cache"
    filled(teacher, x, path=path, data="mine")
    other = copy.deepcopy(teacher)
    with torch.no_grad():
        other[5].bias[0] += 1e-3
    refused = {
        "teacher": lambda: filled(other, x, path=path, data="mine"),
        "rows": lambda: filled(teacher, x[:-1], path=path, data="mine"),
        "views": lambda: filled(teacher, x, path=path, data="mine", views=2),
        "taps": lambda: filled(teacher, x, TAPS[:1], path=path, data="mine"),
        "data": lambda: filled(teacher, x, path=path, data="yours"),
    }
    for what, call in refused.items():
        with pytest.raises(ValueError, match=f"belongs to something else: expected {what} .* got"):
            call()
    assert filled(teacher, x, path=path, data="mine").holds(torch.arange(ROWS))


class Heads(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.body = network(channels)

    def forward(self, x):
        said = self.body(x)
        return said, said.flip(1)


def test_what_was_kept_of_another_teacher_is_refused():
    """Of other weights, another output or features with other channels: the losses would be wrong, and nothing said."""
    x, target = images()
    torch.manual_seed(1)
    teacher, other, student = Heads(6), Heads(6), Heads(4)
    taps = [f"body.{name}" for name in TAPS]

    def cache(of, **options):
        return filled(of, x, taps, output=0, **options)[torch.arange(4)]

    options = {"goal": Classification(), "example_inputs": (x[:2],), "dim": 8}
    distiller = Distiller(teacher, student, taps, taps, output=0, **options)
    same = cache(copy.deepcopy(teacher))
    torch.testing.assert_close(distiller.loss((x[:4],), target[:4], same).kd, distiller.loss((x[:4],), target[:4]).kd)
    for taught, says in (
        (cache(other), "its weights are others"),
        (cache(Heads(8)), "its weights have other shapes"),
        (filled(teacher, x, taps, output=1)[torch.arange(4)], "output=1 of it was kept, not output=0"),
        (cache(teacher, channels_last=True), r"it has the channels of body\.1\.2 last, not second"),
    ):
        with pytest.raises(ValueError, match=f"got one of another: {says}"):
            distiller.loss((x[:4],), target[:4], taught)
    # Weights that are cast, or gone because nobody runs them any more, tell nothing.
    for changed in (copy.deepcopy(teacher).double(), copy.deepcopy(teacher).to("meta")):
        Distiller(changed, student, [], [], output=0, goal=Classification(), beta=0.0).loss((x[:4],), target[:4], same)


def test_teachers_with_sparse_buffers_are_kept():
    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)
            self.register_buffer("graph", torch.eye(4).to_sparse())

        def forward(self, x):
            return self.layer(x)

    teacher, x = Graph(), torch.randn(4, 3)
    cache = TeacherCache(teacher, [], rows=4, example_inputs=(x,))
    cache.add(torch.arange(4), (x,))
    torch.testing.assert_close(cache[torch.arange(4)].output, teacher(x))


def test_a_file_of_another_output_is_refused(tmp_path):
    x, _ = images()
    teacher = Heads(6)
    for first, second in (({"output": 0}, {"output": 1}), ({"output": 0}, {"output": 0, "channels_last": True})):
        path = tmp_path / f"{len(second)}.cache"
        taps = [f"body.{name}" for name in TAPS]
        filled(teacher, x, taps, path=path, **first)
        options = {"rows": len(x), "example_inputs": (x[:2],), "path": path, "max_bytes": 1 << 30}
        with pytest.raises(ValueError, match="belongs to something else"):
            TeacherCache(teacher, taps, **second, **options).holds(torch.arange(4))
    with pytest.raises(ValueError, match="is a folder; give the path of a file in it"):
        filled(teacher, x, [], output=0, path=tmp_path)


def test_bad_calls_are_refused():
    x, labels = images()
    teacher, _ = pair()
    cache = filled(teacher, x)
    for rows, says in (
        (torch.tensor([0, ROWS]), r"rows must lie in 0..11, got 0..12"),
        (torch.tensor([-1]), r"rows must lie in 0..11, got -1..-1"),
        (torch.tensor([0.0]), r"rows must be a tensor of row numbers \[B\], got \(1,\) torch.float32"),
        (torch.tensor(3), r"rows must be a tensor of row numbers \[B\], got \(\) torch.int64"),
        ([1, 2], r"rows must be a tensor of row numbers \[B\], got list"),
    ):
        with pytest.raises(ValueError, match=says):
            cache[rows]
    with pytest.raises(ValueError, match=r"view must lie in 0..0, got 1..1"):
        cache[torch.tensor([0]), 1]
    fresh = TeacherCache(teacher, TAPS, rows=ROWS, example_inputs=(x[:2],))
    for inputs, rows in ((x[:3], 2), (torch.randn(2, 3, 10, 10), 2)):
        with pytest.raises(ValueError, match=r"add: expected an output \[2, \*\(5,\)\] and features"):
            fresh.add(torch.arange(rows), (inputs,))
    assert not fresh.holds(torch.arange(1))
    for arguments, error, says in (
        ({"rows": 0}, ValueError, "rows and views must be at least 1, got 0 and 1"),
        ({"example_inputs": x[:2]}, TypeError, "example_inputs must be a tuple .* got Tensor"),
        ({"output": lambda y: (y, y)}, TypeError, "returns a tuple of 2|one tensor"),
    ):
        with pytest.raises(error, match=says):
            TeacherCache(teacher, TAPS, **{"rows": ROWS, "example_inputs": (x[:2],), **arguments})

    class Whole(nn.Module):
        def forward(self, teacher_features, student_features):
            return (teacher_features[0] - student_features[0]).square().mean()

    options = {"goal": Classification(), "example_inputs": (x[:2],), "matching": Whole()}
    distiller = Distiller(teacher, network(6), TAPS, TAPS, **options)
    with pytest.raises(ValueError, match=r"Whole compares whole features, got the statistics of a TeacherCache"):
        distiller.loss((x[:4],), labels[:4], cache[torch.arange(4)])


def test_outputs_that_are_no_tensor_are_refused():
    class Scores(nn.Module):
        def forward(self, x):
            return x.sum(1), x

    with pytest.raises(TypeError, match="the goal takes one tensor, but the model returns a tuple of 2"):
        TeacherCache(Scores(), (), rows=4, example_inputs=(torch.rand(2, 3),))
    assert not Ranking.takes_tensor  # its teachers return such a pair


def test_a_double_teacher_is_kept_in_double():
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    taught = filled(network(6).double(), x)[torch.arange(4)]
    assert {taught.output.dtype, taught.stats.means.dtype, taught.stats.energy.dtype} == {torch.float64}


def test_a_compiled_loss_takes_what_was_kept():
    x, labels = images()
    teacher, student = pair()
    options = {"goal": Classification(), "example_inputs": (x[:2],), "dim": 8}
    distiller = Distiller(teacher, student, TAPS, TAPS, **options)
    cache = filled(teacher, x)
    want = distiller.loss((x[:4],), labels[:4], cache[torch.arange(4)])
    torch.compiler.reset()
    compiled = torch.compile(distiller.loss, backend="aot_eager", fullgraph=True)
    got = compiled((x[:4],), labels[:4], cache[torch.arange(4)])
    torch.testing.assert_close(got.terms(), want.terms(), rtol=1e-3, atol=1e-5)


def test_sad_takes_statistics_alone():
    from sparsekd.features import feature_stats

    torch.manual_seed(0)
    teacher = [torch.rand(4, 6, 8, 8), torch.rand(4, 12, 4, 4)]
    student = [torch.rand(4, 4, 8, 8), torch.rand(4, 8, 4, 4)]
    sad = SAD.from_features(teacher, student, 8).eval()
    torch.testing.assert_close(sad(feature_stats(teacher), student), sad(teacher, student), rtol=0, atol=0)
    with pytest.raises(ValueError, match="teacher feature 0 must have 6 channels, got 12"):
        sad(feature_stats(teacher[::-1]), student)
    with pytest.raises(ValueError, match=r"same batch size, got \[3, 4\]"):
        sad(feature_stats([feature[:3] for feature in teacher]), student)


def test_every_pair_of_views_and_rows_has_a_place_of_its_own():
    x, _ = images()
    cache = TeacherCache(network(2), (), rows=3, views=4, example_inputs=(x[:2],))
    for count, (row, view) in enumerate(itertools.product(range(3), range(4))):
        assert sum(cache.holds(torch.tensor([r]), v) for r, v in itertools.product(range(3), range(4))) == count
        cache.add(torch.tensor([row]), (x[row : row + 1],), view)


def test_a_single_tensor_is_no_tuple_of_inputs():
    x, _ = images()
    cache = TeacherCache(network(2), (), rows=3, example_inputs=(x[:2],))
    with pytest.raises(TypeError, match=r"TeacherCache.add: inputs must be a tuple, got Tensor; pass \(x,\)"):
        cache.add(torch.arange(2), x[:2])


def test_the_example_in_the_docs_is_right():
    result = doctest.testmod(importlib.import_module("sparsekd.teacher_cache.cache"))
    assert result.attempted and not result.failed
