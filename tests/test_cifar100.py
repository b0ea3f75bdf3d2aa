"""CIFAR-100: both distributions, hostile pickles, crops, recipes, a sweep that stops and goes on, two ranks."""

import dataclasses
import functools
import importlib
import io
import json
import os
import pickle
import subprocess
import sys
from typing import ClassVar

import numpy as np
import pytest
import torch

from sparsekd import checkpoint, data, models, report
from sparsekd.convert import SPARSE_TYPES
from sparsekd.data import cifar100
from sparsekd.methods import PAPER
from sparsekd.runs import epochs as loop
from sparsekd.runs import recipes

train = importlib.import_module("sparsekd.runs.run")  # the module, whose name `runs.run` is the function

PER_CLASS = {"train": 6, "test": 2}


def made_up(part: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N, 3072] and labels [N] of every class; test image 0 is train image 0."""
    random = np.random.default_rng(1)
    labels = random.permutation(np.repeat(np.arange(100), PER_CLASS[part]))
    images = random.integers(0, 256, (len(labels), 3072), dtype=np.uint8)
    images[:] = (images.astype(int) + 2 * labels[:, None]) // 3  # something to learn
    images[0] = 7
    return images, labels


class Python2Pickler(pickle._Pickler):
    """Writes bytes as Python 2 wrote its strings, and numpy's names as they then were: what the real files hold."""

    dispatch = pickle._Pickler.dispatch.copy()

    def save_string(self, value):
        self.write(pickle.BINSTRING + len(value).to_bytes(4, "little") + value)

    def save_array(self, array):
        self.write(pickle.GLOBAL + b"numpy.core.multiarray\n_reconstruct\n" + pickle.GLOBAL + b"numpy\nndarray\n")
        self.save((0,))
        self.save_string(b"b")
        self.write(pickle.TUPLE3 + pickle.REDUCE)
        self.write(pickle.MARK)
        self.save(1)
        self.save(array.shape)
        self.write(pickle.GLOBAL + b"numpy\ndtype\n")
        self.save_string(b"u1")
        self.save(0)
        self.save(1)
        self.write(pickle.TUPLE3 + pickle.REDUCE)
        self.save((3, b"|", None, None, None, -1, -1, 0))
        self.write(pickle.BUILD)
        self.save(False)
        self.save_string(array.tobytes())
        self.write(pickle.TUPLE + pickle.BUILD)

    dispatch[bytes] = save_string
    dispatch[np.ndarray] = save_array


def pickled(content) -> bytes:
    stream = io.BytesIO()
    Python2Pickler(stream, 2).dump(content)
    return stream.getvalue()


@pytest.fixture(scope="module", autouse=True)
def _small_files():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cifar100, "IMAGES", {part: 100 * count for part, count in PER_CLASS.items()})
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("cifar")
    (root / "cifar-100-binary").mkdir()
    for part in PER_CLASS:
        images, labels = made_up(part)
        records = np.concatenate([(labels[:, None] // 5), labels[:, None], images], axis=1).astype(np.uint8)
        (root / "cifar-100-binary" / f"{part}.bin").write_bytes(records.tobytes())
    return root


@pytest.fixture(scope="module")
def task(folder):
    return data.load("cifar100", folder, validation=100)


def test_binary_and_python_versions_are_the_same(task, tmp_path):
    for part in PER_CLASS:
        images, labels = made_up(part)
        (tmp_path / part).write_bytes(pickled({b"data": images, b"fine_labels": labels.tolist()}))
    other = data.load("cifar100", tmp_path, validation=100)
    for part in ("train", "val", "test"):
        assert torch.equal(getattr(task, part).inputs[0], getattr(other, part).inputs[0])
        assert torch.equal(getattr(task, part).target, getattr(other, part).target)
    assert other.meta["sha256"].keys() == {"train", "test"}


def test_parts_are_balanced_and_do_not_overlap(task, folder):
    images, labels = made_up("train")
    counts = [torch.bincount(getattr(task, part).target, minlength=100) for part in ("train", "val", "test")]
    assert [set(count.tolist()) for count in counts] == [{5}, {1}, {2}]
    together = torch.cat([task.train.inputs[0], task.val.inputs[0]]).flatten(1).numpy()
    assert sorted(map(bytes, together)) == sorted(map(bytes, images))
    by_image = {bytes(image): label for image, label in zip(images, labels, strict=True)}
    assert [by_image[bytes(x)] for x in task.val.inputs[0].flatten(1).numpy()] == task.val.target.tolist()
    assert task.meta["identical_images"].startswith("1 groups of identical images, 1 of them across train and test")
    few = data.load("cifar100", folder, validation=100, images=200, test=100, pixels=8)
    assert [len(few.train), len(few.val), len(few.test)] == [200, 100, 100]
    assert torch.equal(few.val.target, task.val.target)  # held out whatever else is asked for
    blocks = task.val.inputs[0].float().unflatten(3, (8, 4)).unflatten(2, (8, 4)).mean((3, 5))
    assert (few.val.inputs[0].float() - blocks).abs().max() <= 0.5


def test_files_that_are_not_the_whole_official_part_are_refused(folder, tmp_path):
    train_file, test_file = ((folder / "cifar-100-binary" / f"{part}.bin").read_bytes() for part in PER_CLASS)
    for first, second, message in (
        (train_file[: -100 * 3074], test_file, "train.bin must hold the 600 images of the official .* got 500"),
        (train_file, test_file[3074:], "test.bin must hold the 200 images of the official test part, got 199"),
        (test_file, train_file, "train.bin must hold the 600 images of the official train part, got 200"),
    ):
        (tmp_path / "train.bin").write_bytes(first)
        (tmp_path / "test.bin").write_bytes(second)
        with pytest.raises(ValueError, match=message):
            data.load("cifar100", tmp_path, validation=100)


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/sparsekd-was-here",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps({b"data": Evil()}), "asks for posix.system"),
        (pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"fine_labels": [print]}), "asks for"),
        (pickled({b"data": np.zeros((1, 5), np.uint8), b"fine_labels": [0]}), r"uint8 \(1, 5\)"),
        (pickled({b"fine_labels": [0]}), "KeyError"),
        (pickled([1, 2]), "AttributeError"),
        (b"", "EOFError"),
        (pickled({b"data": np.zeros((1, 3072), np.uint8), b"fine_labels": [100]}), r"must lie in 0\.\.99, got 100"),
    ],
)
def test_bad_pickles_are_refused(tmp_path, content, message):
    (tmp_path / "train").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        data.load("cifar100", tmp_path)


def test_bad_folders_and_options_are_refused(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match=r"cifar-100-binary/train\.bin"):
        data.load("cifar100", tmp_path)
    (tmp_path / "train.bin").write_bytes(bytes(3073))
    with pytest.raises(ValueError, match="records of 3074 bytes, got 3073"):
        data.load("cifar100", tmp_path)
    for options, message in (
        ({"validation": 150}, "multiple of 100"),
        ({"validation": 600}, "a class has 6 images"),
        ({"validation": 100, "images": 600}, "1 of them are held out already, and 6 are asked for"),
        ({"validation": 100, "pixels": 20}, "32, 16 or 8"),
        ({"validation": 100, "classes": 101}, r"classes must lie in 2\.\.100, got 101"),
    ):
        with pytest.raises(ValueError, match=message):
            data.load("cifar100", folder, **options)


def test_fewer_classes_leave_out_the_images_of_the_others(folder):
    task = data.load("cifar100", folder, validation=20, classes=20)
    assert task.sizes["classes"] == 20 and task.target_range == (0, 19)
    for part, each in ((task.train, 5), (task.val, 1), (task.test, 2)):
        assert torch.bincount(part.target).tolist() == [each] * 20


def test_crops_are_windows_of_the_padded_image(task):
    x = task.train.inputs[0][:64]
    prepare = dataclasses.replace(task.train.prepare, mean=(0.0,) * 3, std=(1 / 255,) * 3)
    (augmented,) = prepare((x,), torch.Generator().manual_seed(0))
    assert augmented.is_contiguous(memory_format=torch.channels_last)
    padded = torch.nn.functional.pad(x, (4, 4, 4, 4)).float()
    found = []
    for image, wanted in zip(padded, augmented.round(), strict=True):
        windows = {
            (top, left, mirrored): (image.flip(2) if mirrored else image)[:, top : top + 32, left : left + 32]
            for top in range(9)
            for left in range(9)
            for mirrored in (False, True)
        }
        found.append([place for place, window in windows.items() if torch.equal(window, wanted)])
    assert all(found[1:])  # image 0 is of one colour and fits nearly anywhere
    corners = {place[:2] for places in found[1:] for place in places}
    mirrored = sum(places[0][2] for places in found[1:])
    assert len(corners) > 30 and 16 < mirrored < 48
    (plain,) = prepare((x,))
    torch.testing.assert_close(plain, x.float())


def test_standardised_over_the_training_part(task):
    (x,) = task.train.examples(len(task.train))
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-3, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3)), torch.ones(3), atol=1e-3, rtol=0)


def test_paper_recipes_are_those_of_its_table(task):
    choice = recipes.Choice((*train.METHODS, *train.ABLATIONS), (0.7, 0.5, 0.4, 0.3), recipe="paper")
    found = {network.folder: network for network in recipes.networks(task, choice)}
    for method, column in PAPER.items():
        recipe = found[method].recipe
        assert (recipe.epochs, recipe.lr, recipe.weight_decay, recipe.milestones, recipe.batch_size) == (
            column.epochs,
            column.learning_rate,
            column.weight_decay,
            column.milestones,
            64,
        )
        assert (found[method].alpha, found[method].beta, found[method].schedule) == (
            column.alpha,
            column.beta,
            column.schedule,
        )
    assert found["sp-sad"].densities == (0.7, 0.5, 0.4, 0.3)
    with pytest.raises(ValueError, match=r"prunes sp-sad to the densities 0.3, 0.4, .*, got 0.2; choose among these"):
        recipes.networks(task, dataclasses.replace(choice, densities=(0.2,)))  # beyond its schedule
    ticket = found["ss-sad"].ticket
    assert (ticket.lr, ticket.weight_decay, ticket.milestones) == (0.05, 5e-4, ())
    assert {network.pattern for network in found.values()} == {"16x1"}
    assert found["sad"].recipe.milestones == (150, 180, 210) and found["sad"].beta == 200
    assert (found["magnitude"].alpha, found["magnitude"].beta) == (0, 0)
    assert found["random"].options == {"score": "random"} and found["at"].features == "at"
    reduced = {n.folder: n for n in recipes.networks(task, dataclasses.replace(choice, protocol="reduced"))}
    for network in reduced.values():
        assert network.recipe.epochs < found[network.folder].recipe.epochs / 9
        if network.schedule:
            network.schedule.check_reaches(network.recipe.epochs)
            assert network.densities == found[network.folder].densities


def test_our_reduced_recipe_is_that_of_its_protocol(task):
    protocol = recipes.PROTOCOLS["reduced"]
    choice = recipes.Choice((*train.METHODS, *train.ABLATIONS), (0.7, 0.2), protocol="reduced")
    found = {network.folder: network for network in recipes.networks(task, choice)}
    assert found["teacher"].recipe.epochs == protocol.teacher_epochs
    assert {found[name].recipe.epochs for name in ("student", "kd", "at", "sad")} == {6 * protocol.round_epochs}
    assert (found["at"].beta, found["at"].features) == (protocol.at_beta, "at")
    assert {found[name].beta for name in ("sad", "random", *train.METHODS)} == {protocol.beta}
    quick = {n.folder: n for n in recipes.networks(task, dataclasses.replace(choice, quick=True))}
    assert quick["teacher"].recipe.epochs == quick["student"].recipe.epochs == 6


def test_the_ticket_of_the_paper_learns_at_its_own_rate(task, monkeypatch, tmp_path):
    seen = {}
    monkeypatch.setattr(
        loop,
        "_train_epoch",
        lambda *args: seen.update({args[5]: args[4]}) or dict.fromkeys(("loss", "task", "kd", "sad"), 0.0),
    )
    monkeypatch.setattr(loop, "predict", lambda model, part: torch.zeros(len(part), 100))
    choice = recipes.Choice(("ss-sad",), (0.5,), quick=True, recipe="paper")
    network = next(n for n in recipes.networks(task, choice) if n.method)
    loop.fit(Tiny(), task, dataclasses.replace(network, alpha=0.0, beta=0.0), folder=tmp_path)
    rates = [seen[epoch].lr for epoch in sorted(seen)]
    ticket = rates.count(0.05)
    assert 0 < ticket < len(rates) and rates == [0.05] * ticket + [5e-4] * (len(rates) - ticket)


@pytest.mark.parametrize("method", list(train.METHODS))
def test_sweeps_pass_every_density(task, method):
    targets = (0.3, 0.5, 0.6, 0.7, 0.8)
    for length in (1, 2, 40):
        schedule, options, epochs = recipes._sweep(method, targets, length)
        schedule.check_reaches(epochs - options.get("initial_epochs", 0))
        assert schedule.targets == targets and options.get("rewind_to", 0) < schedule.every


class Tiny(models.Classifier):
    """A stem, one block with a tap, a head: trains in no time and is pruned like the others."""

    def __init__(self, width=16):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, width, 3, 2, 1)
        self.block = models.BasicBlock(width, 2 * width, 2)
        self.head = torch.nn.Linear(2 * width, 100)

    @property
    def tap_names(self):
        return ("block.relu1", "block.relu2")

    def forward(self, x):
        return self.head(self.block(self.stem(x)).mean((2, 3)))


def shrink(monkeypatch):
    monkeypatch.setattr(cifar100, "IMAGES", {part: 100 * count for part, count in PER_CLASS.items()})
    monkeypatch.setitem(models.CLASSIFIERS, "wrn-40-2", lambda classes: Tiny(32))
    monkeypatch.setitem(models.CLASSIFIERS, "wrn-16-2", lambda classes: Tiny())
    quick = {"images": 200, "validation": 200, "test": 100, "pixels": 8}
    monkeypatch.setattr(train, "QUICK_IMAGES", quick)


@pytest.fixture
def tiny(monkeypatch):
    shrink(monkeypatch)


def config(folder, out, **fields):
    fields = {"methods": ("kd", "at", *train.METHODS, "random", "magnitude"), "densities": (0.6, 0.3), **fields}
    return train.RunConfig("cifar100", str(folder), quick=True, out=str(out), measure=False, device="cpu", **fields)


def test_a_sweep_makes_a_row_of_every_density(folder, tmp_path, tiny):
    results, out = train.run(config(folder, tmp_path), lambda line: None)
    names = [row["name"] for row in results["rows"]]
    assert names[:5] == ["teacher", "student", "KD", "AT", "SAD"] and len(names) == 5 + 2 * 5
    for row in results["rows"][5:]:
        metrics = row["metrics"]
        assert metrics["weights_kept"] == pytest.approx(row["target_density"], abs=0.02)
        assert 0 <= metrics["accuracy"] <= 1 and "latency_ratio" not in metrics
        (kept,) = {tuple(one["shape"]) for name, one in row["blocks"].items() if name == "block.conv2"}
        assert kept == (2, 32, 3, 3)
    first, second = (row for row in results["rows"] if row["name"] == "LTH-SAD")
    epochs = first["epochs"]
    assert [e["level"] for e in epochs] == [1.0, 1.0, 0.6, 0.6, 0.3, 0.3] and second["epochs"] == []
    assert [e["rewound"] for e in epochs] == [False, True, False, True, False, False]
    assert first["best_epoch"] == 4 and second["best_epoch"] == 6
    saved = checkpoint.metadata(out / "seed0/lth-sad/model-0.6.safetensors")
    assert saved["epoch"] == 4 and saved["val_accuracy"] == epochs[3]["val_accuracy"]
    chosen = [e["target_density"] for e in results["summary"] if e["name"] == "LTH-SAD" and e["selected"]]
    best = max((first, second), key=lambda row: row["metrics"]["val_accuracy"])
    assert chosen == [best["target_density"]]
    assert "LTH-SAD @ 0.6" in report.result_tables(results)


def test_stops_in_time_and_goes_on_with_the_same_bits(folder, tmp_path, tiny):
    methods = ("lth-sad", "ss-sad")
    whole, _ = train.run(config(folder, tmp_path / "whole", methods=methods), lambda line: None)
    stops = 0
    while True:
        try:  # an epoch a call
            short, _ = train.run(
                config(folder, tmp_path / "short", methods=methods, stop_after=1e-6), lambda line: None
            )
            break
        except train.OutOfTime:
            stops += 1
    assert stops > 10
    for left, right in zip(whole["rows"], short["rows"], strict=True):
        for timing in ("train_seconds", "train_joules", "step_ms_first", "step_ms_last"):
            left["metrics"].pop(timing), right["metrics"].pop(timing)
        assert left["metrics"] == right["metrics"] and left["blocks"] == right["blocks"]


def test_learning_rates():
    recipe = dataclasses.replace(cifar100.PLAIN, lr=1.0, milestones=(2, 4))
    assert [loop._learning_rate(recipe, e, 0.0, (1, 6)) for e in range(1, 7)] == pytest.approx(
        [1, 1, 0.1, 0.1, 0.01, 0.01]
    )
    cosine = dataclasses.replace(recipe, milestones=None)
    assert loop._learning_rate(cosine, 3, 0.0, (3, 4)) == 1.0
    assert loop._learning_rate(cosine, 4, 0.0, (3, 4)) == pytest.approx(0.5)


class Watched(Tiny):
    """Notes in which mode and type it computes."""

    seen: ClassVar = set()

    def forward(self, x):
        logits = super().forward(x)
        self.seen.add((self.training and torch.is_grad_enabled(), logits.dtype))
        return logits


@pytest.mark.parametrize("bf16", [False, True])
def test_precision_is_bf16_where_asked(folder, tmp_path, tiny, monkeypatch, bf16):
    monkeypatch.setattr(Watched, "seen", set())
    monkeypatch.setitem(models.CLASSIFIERS, "wrn-16-2", lambda classes: Watched())
    results, _ = train.run(config(folder, tmp_path, methods=(), bf16=bf16), lambda line: None)
    trained = torch.bfloat16 if bf16 else torch.float32
    assert {dtype for training, dtype in Watched.seen if training} == {trained}
    assert {dtype for training, dtype in Watched.seen if not training} == {trained, torch.float32}  # test: float32
    precision = "bf16 autocast" if bf16 else "float32"
    assert results["protocol"]["precision"] == f"training and validation in {precision}; test in float32"


def test_compiled_steps_learn_the_same(folder, tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))  # no C++ compiler
    settings = config(folder, tmp_path, methods=("sp-sad",))
    task = train._load(settings)
    network = recipes.networks(task, settings.choice)[-1]
    epochs = []
    for compiled in (False, True):
        torch.manual_seed(0)
        teacher, student = models.teacher(task), models.student(task)
        options = {"teacher": teacher, "folder": tmp_path / str(compiled), "runtime": loop.Runtime(compiled=compiled)}
        epochs.append(loop.fit(student, task, network, **options))
    assert [epoch["pruned"] for epoch in epochs[1]] == [True, True, False]
    for key in ("loss", "task", "kd", "sad"):
        assert [e[key] for e in epochs[1]] == pytest.approx([e[key] for e in epochs[0]], rel=1e-3)


TWO_RANKS = """
import sys
sys.path.insert(0, sys.argv[3])
import pytest
from tests import test_cifar100 as here
from sparsekd import distributed
train = here.train
here.shrink(pytest.MonkeyPatch())
fit = train.fit
def checked(model, *args, **options):
    epochs = fit(model, *args, **options)
    distributed.check_same_masks(model)
    state = [float(p.double().sum()) for p in model.state_dict().values()]
    distributed._check_same("values", model, state)
    return epochs
train.fit = checked
results, out = train.run(here.config(sys.argv[1], sys.argv[2], methods=("lth-sad", "random")), lambda line: None)
print(len(results["rows"]))
"""


def on_two_ranks(script: str, folder, tmp_path) -> subprocess.CompletedProcess:
    (tmp_path / "two.py").write_text(script)
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*command, str(tmp_path / "two.py"), str(folder), str(tmp_path / "out"), root],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_two_ranks_train_one_network(folder, tmp_path):
    done = on_two_ranks(TWO_RANKS, folder, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.replace("\n", "") == "77"  # the two may print at once
    rows = json.loads((tmp_path / "out/seed0/lth-sad/rows.json").read_text())
    saved = checkpoint.load(Tiny(), tmp_path / "out/seed0/lth-sad/model-0.3.safetensors")
    kept = [layer.num_kept for layer in saved.modules() if isinstance(layer, SPARSE_TYPES)]
    assert kept and rows[1]["metrics"]["weights_kept"] == pytest.approx(0.3, abs=0.02)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_ranks_that_train_apart_are_found_after_an_epoch(folder, tmp_path):
    apart = "from sparsekd import distributed; distributed.average_gradients = lambda parameters: None"
    done = on_two_ranks(f"{apart}\n{TWO_RANKS}", folder, tmp_path)
    assert done.returncode == 1 and "rank 1 holds other parameters than rank 0" in done.stderr


STOPPED_RANKS = """
import datetime, sys, time
sys.path.insert(0, sys.argv[3])
import pytest, torch
from tests import test_cifar100 as here
from sparsekd import cli
train = here.train
here.shrink(pytest.MonkeyPatch())
torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
def run(**fields):
    return train.run(here.config(sys.argv[1], sys.argv[2], methods=(), **fields), lambda line: None)[0]
run()
clear = train._clear
def slowly(out):
    time.sleep(3)
    clear(out)
train._clear = slowly
trained = []
fit = train.fit
train.fit = lambda *args, **options: trained.append(1) or fit(*args, **options)
run(fresh=True)
assert len(trained) == 3, "rank 1 has read what rank 0 was about to clear"
try:
    run(remeasure=True, stop_after=1e-9)
    raise AssertionError("not stopped")
except train.OutOfTime:
    torch.distributed.barrier()  # both are here
arguments = ["run", "cifar100", "--data", sys.argv[1], "--out", sys.argv[2] + "2", "--quick", "--method", "kd"]
assert cli.main([*arguments, "--device", "cpu", "--stop-after", "1e-9"]) == cli.TRY_AGAIN
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_ranks_begin_afresh_and_stop_together(folder, tmp_path):
    done = on_two_ranks(STOPPED_RANKS, folder, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count("time is up") == 1  # rank 0 says so
