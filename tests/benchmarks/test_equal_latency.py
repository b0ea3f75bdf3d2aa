"""The experiment trains every way of every method to the same predicted times, goes on, times and draws them."""

import json
import struct
import sys

import numpy as np
import pytest
import torch

from benchmarks import equal_latency
from benchmarks.lib import equal_latency_data
from sparsekd import data
from sparsekd.data import cifar100
from sparsekd.pruning import CostTable, LayerCost, Pruner
from sparsekd.pruning.cost import network_of
from sparsekd.runs.plans.images import PROTOCOLS

from .. import cifar
from .test_scripts import run_script


def write_idx(path, array):
    path.write_bytes(
        struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()
    )


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Ten made-up pictures of each class, narrow networks, and a table of costs that nobody measured."""
    pictures = np.random.default_rng(0).integers(0, 255, (100, 28, 28))
    for part, count in (("train", 100), ("t10k", 20)):
        write_idx(tmp_path / f"{part}-images-idx3-ubyte", pictures[:count])
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte", np.arange(count) % 10)
    monkeypatch.setattr(equal_latency, "TURNS", 1)
    monkeypatch.setattr(equal_latency, "STUDENT", (16, 16, 16, 16))
    monkeypatch.setattr(equal_latency, "TEACHER", (16, 16, 16, 16))
    monkeypatch.setattr(equal_latency, "METHOD_NAMES", ("ss-sad",))
    model = equal_latency.network(equal_latency.STUDENT, equal_latency_data.DATASETS["fashion-mnist"])
    shapes = network_of(model)
    layers = Pruner(model, pattern=equal_latency.PATTERN, exclude=equal_latency.not_pruned(model), rewindable=False)
    costs = {name: LayerCost("16x1", 20.0, (0.1, 0.5), (2.0, 10.0)) for name in layers.layers()}
    table = CostTable("here", "none", 1, 1, ((1, 3, 28, 28),), "float32", "float32", shapes, 10.0, costs)
    monkeypatch.setattr(CostTable, "load", classmethod(lambda cls, path, **options: table))
    (tmp_path / "costs.json").write_text("{}")
    return tmp_path


def options_of(folder, **fields):
    common = {"out": folder, "data": folder, "seeds": 1, "points": [0.5], "images": 40, "round_images": 30}
    common |= {
        "teacher_epochs": 1,
        "dense_epochs": 1,
        "round_epochs": 1,
        "layer_ms": 0.1,
        "seconds": 0.01,
        "json": folder / "kept.json",
        "dataset": "fashion-mnist",
    }
    return type("Options", (), {**common, "svg": folder / "docs" / "picture.svg", **fields})


def test_every_way_is_trained_timed_and_drawn(folder, capsys):
    equal_latency.train_all(options_of(folder))
    rows = equal_latency.rows_in(folder)
    pruned = [row for row in rows if row["way"] != "dense"]
    assert [row["method"] for row in rows[:2]] == ["teacher", "student"]
    assert [(row["method"], row["way"], row["point"]) for row in pruned] == [
        ("ss-sad", way, 0.5) for way in ("cost", "weights", "uniform", "random")
    ]
    dense = 10.0 + 20.0 * len(pruned[0]["densities"])
    for row in pruned:
        assert row["predicted_us"] == pytest.approx(row["point"] * dense, rel=0.03)
        assert 0 <= row["accuracy"] <= 1 and 0 < row["macs_kept"] < 1
    equal_latency.train_all(options_of(folder))  # goes on: nothing is left to do
    assert equal_latency.rows_in(folder) == rows
    with pytest.raises(ValueError, match="holds another protocol"):
        equal_latency.train_all(options_of(folder, images=30))

    equal_latency.time_all(options_of(folder))
    kept = json.loads((folder / "kept.json").read_text())
    *ours, openvino = kept["rows"]
    assert openvino["method"] == "openvino" and (openvino["absent"] or openvino["measured_us"] > 0)
    assert all(row["measured_us"] > 0 for row in ours) and kept["machine"]["protocol"]["images"] == 40
    equal_latency.chart(options_of(folder))
    picture = (folder / "docs" / "picture.svg").read_text()
    assert picture.startswith("<svg xmlns") and "SS-SAD: test accuracy" in picture and picture.count("<polyline") == 0
    assert "measured" in capsys.readouterr().out


def test_a_missing_file_is_named(monkeypatch, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train-images-idx3-ubyte does not exist, nor with .xz"):
        equal_latency_data.fashion_mnist(tmp_path)
    assert run_script(monkeypatch, "benchmarks.equal_latency", "train") == 2


def test_pictures_are_mirrored_in_training_only():
    x = torch.arange(28.0).expand(3, 28, 28)
    plain = equal_latency_data.prepared((x,), None)[0]
    mirrored = equal_latency_data.prepared((x,), torch.Generator().manual_seed(0))[0]
    assert plain.shape == (3, 3, 28, 28) and torch.equal(plain, equal_latency_data.prepared((x,), None)[0])
    flipped = [torch.equal(m, p.flip(2)) for m, p in zip(mirrored, plain, strict=True)]
    assert all(f or torch.equal(m, p) for f, m, p in zip(flipped, mirrored, plain, strict=True)) and any(flipped)


def test_reduced_cifar_has_the_pictures_of_the_run(monkeypatch, tmp_path):
    monkeypatch.setattr(cifar100, "IMAGES", {part: 100 * count for part, count in cifar.PER_CLASS.items()})
    load, asked = data.load, {}

    def load_made_up(name, root, **options):  # of which there are too few to hold out as many
        asked.update(options)
        return load(name, root, **{**options, "validation": 20})

    monkeypatch.setattr(equal_latency_data.data, "load", load_made_up)
    pictures = equal_latency_data.DATASETS["cifar100-reduced"]
    train, test = pictures.load(cifar.write(tmp_path))
    protocol = PROTOCOLS["reduced"]
    assert all(asked[name] == getattr(protocol, name) for name in ("validation", "pixels", "classes"))
    (x,), labels = next(iter(train.batches(64)))
    side = protocol.pixels
    assert x.shape[1:] == (3, side, side) == pictures.example(1).shape[1:] and int(labels.max()) < protocol.classes
    few = pictures.first(train, 3 * protocol.classes)
    assert torch.bincount(few.target).tolist() == [3] * protocol.classes
    assert set(test.target.tolist()) == set(range(protocol.classes))


def test_a_method_trains_a_round_dense_and_one_at_each_point():
    protocol = equal_latency.Protocol((0.3, 0.5), 40, 30, 1, 1, round_epochs=2)
    schedule, more, epochs = equal_latency.schedule_of("sp-sad", protocol)
    assert (schedule.targets, schedule.every, more, epochs) == ((0.5, 0.7), 2, {}, 6)
    schedule, more, epochs = equal_latency.schedule_of("ss-sad", protocol)
    assert (schedule.start, more["initial"].final, more["initial_epochs"], epochs) == (0.25, 0.25, 4, 10)


def test_another_dataset_has_files_of_its_own(monkeypatch):
    taken = []
    monkeypatch.setattr(equal_latency, "chart", taken.append)
    for more in ((), ("--dataset", "cifar100-reduced")):
        monkeypatch.setattr(sys, "argv", ["equal_latency", "chart", *more])
        with pytest.raises(SystemExit):
            equal_latency.main()
    usual, other = taken
    assert usual.json == "benchmarks/results/equal_latency.json" and usual.svg == "docs/equal_latency.svg"
    assert not {usual.json, usual.svg, usual.out} & {other.json, other.svg, other.out}
