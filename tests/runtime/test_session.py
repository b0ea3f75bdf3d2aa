"""Networks frozen in torch, exported, and run by the kernels alone: the same bits, by whatever way they are called."""

import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparsekd
from sparsekd.backends import cpu
from sparsekd.models import STUDENT, MobileNetV2, RatingCNN, WideResNet

from ..freeze.networks import ALL_DENSE, InvertedResidual, Mlp, PreActivation, ResNet, ours_throughout, quick, trained

pytestmark = pytest.mark.skipif(cpu.native is None, reason=cpu.missing)


class Chain(nn.Sequential):
    def __init__(self):
        super().__init__(
            PreActivation(16, 32, 2), InvertedResidual(32, 64), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 5)
        )


NETWORKS = {
    "mlp": (Mlp, (3, 20)),
    "resnet": (ResNet, (3, 3, 8, 8)),
    "chain": (Chain, (2, 16, 8, 8)),
    "wrn": (lambda: WideResNet(10, 1, classes=10), (2, 3, 32, 32)),
    "mobilenet": (lambda: MobileNetV2(classes=10, width=0.5), (2, 3, 32, 32)),
}


def frozen_network(name, monkeypatch, memory_format="channels_last", **options):
    build, shape = NETWORKS[name]
    torch.manual_seed(0)
    model = trained(build()).eval()
    sparsekd.sparsify(model, density=0.5)
    x = torch.randn(shape)
    ours_throughout(monkeypatch)
    return quick(model, x, memory_format=memory_format, **options), x


FORMATS = [(name, "channels_last") for name in NETWORKS] + [(name, "contiguous") for name in ("resnet", "chain")]


@pytest.mark.parametrize("name, memory_format", FORMATS)
def test_an_exported_network_gives_the_same_bits(name, memory_format, monkeypatch, tmp_path):
    frozen, x = frozen_network(name, monkeypatch, memory_format)
    frozen.export(tmp_path / "student.skd")
    session = sparsekd.runtime.Session(tmp_path / "student.skd", threads=2)
    ours = memory_format == "channels_last" and all(one.chosen != "dense" for one in frozen.plan)
    for batch in (1, 2, 5, 9):
        given = torch.randn(batch, *x.shape[1:])
        want, got = frozen(given), torch.from_numpy(session(given.numpy()))
        if ours:
            assert torch.equal(got, want), (got - want).abs().max()
        else:  # layers that torch runs inside torch, the kernels do here
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
        loaded = sparsekd.load_frozen(tmp_path / "student.skd")
        assert torch.equal(loaded(given), got)
    assert ours or memory_format == "contiguous", [one.name for one in frozen.plan if one.chosen == "dense"]


def test_slices_of_a_batch_give_the_same_bits_on_any_number_of_threads(monkeypatch, tmp_path):
    from dataclasses import replace

    frozen, x = frozen_network("resnet", monkeypatch)
    frozen.plan = replace(frozen.plan, images=2)
    frozen.export(tmp_path / "sliced.skd")
    frozen.plan = replace(frozen.plan, images=0)
    frozen.export(tmp_path / "whole.skd")
    given = np.random.default_rng(0).standard_normal((7, *x.shape[1:]), np.float32)
    whole = sparsekd.runtime.Session(tmp_path / "whole.skd", threads=1)(given)
    sliced = sparsekd.runtime.Session(tmp_path / "sliced.skd", threads=1)(given)
    np.testing.assert_allclose(sliced, whole, rtol=1e-4, atol=1e-5)  # other tiles, other roundings
    for threads in (2, 3):
        session = sparsekd.runtime.Session(tmp_path / "sliced.skd", threads=threads)
        np.testing.assert_array_equal(session(given), sliced)


def test_several_threads_and_sessions_at_once(monkeypatch, tmp_path):
    frozen, x = frozen_network("resnet", monkeypatch)
    frozen.export(tmp_path / "student.skd")
    sessions = [sparsekd.runtime.Session(tmp_path / "student.skd", threads=threads) for threads in (1, 2)]
    batches = [np.random.default_rng(i).standard_normal((i + 1, *x.shape[1:]), np.float32) for i in range(4)]
    want, wrong = [sessions[0](one) for one in batches], []

    def work(first):
        for turn in range(30):
            which = (first + turn) % len(batches)
            if not np.array_equal(sessions[turn % 2](batches[which]), want[which]):
                wrong.append(which)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_other_number_formats(dtype, monkeypatch, tmp_path):
    frozen, x = frozen_network("resnet", monkeypatch, dtype=dtype)
    if dtype == "int8":
        frozen = _all_bytes(frozen, x)
    frozen.export(tmp_path / "student.skd")
    session = sparsekd.runtime.Session(tmp_path / "student.skd", threads=2)
    given = torch.randn(4, *x.shape[1:])
    want, got = frozen(given), torch.from_numpy(session(given.numpy()))
    assert got.dtype == torch.float32 and torch.equal(got, want), (got - want).abs().max()


def _all_bytes(frozen, x):
    """Every sparse layer by bytes, whatever was faster."""
    from sparsekd.freeze import int8
    from sparsekd.freeze.layer import FrozenLayer
    from sparsekd.freeze.network import FrozenModel
    from sparsekd.freeze.quantize import ByteScale

    for layer in frozen.network.modules():
        if isinstance(layer, FrozenLayer) and int8._takes_bytes(layer):
            int8.give_bytes(layer, ByteScale(0.05, 100), None)
    return FrozenModel(frozen.network, frozen.plan, frozen.record, frozen.trace)


def test_a_network_that_runs_dense_inside_torch_is_exported_sparse(tmp_path, monkeypatch):
    model = trained(ResNet()).eval()
    sparsekd.sparsify(model, density=0.5)
    x = torch.randn(2, 3, 8, 8)
    freezing = sys.modules["sparsekd.freeze.freeze"]
    monkeypatch.setattr(
        freezing,
        "time_networks",
        lambda runs, inputs, options: {name: 1.0 if name == freezing.DENSE else 100.0 for name in runs},
    )
    frozen = sparsekd.freeze(model, x, layer_ms=1.0, min_gain=1.0)
    assert frozen.plan.eager
    frozen.export(tmp_path / "student.skd")
    session = sparsekd.runtime.Session(tmp_path / "student.skd")
    np.testing.assert_allclose(session(x.numpy()), model(x).detach().numpy(), rtol=1e-3, atol=1e-3)
    assert (tmp_path / "student.skd").stat().st_size < 0.75 * 4 * sum(p.numel() for p in ResNet().parameters())


def test_dense_layers_of_all_kinds_run_by_the_kernels(tmp_path):
    """Grouped, dilated, padded by reflection, one-dimensional and without bias: whatever torch had run itself."""

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.grouped = nn.Conv2d(6, 24, 3, padding=1, groups=3)
            self.reflected = nn.Conv2d(24, 10, 3, padding=1, padding_mode="reflect", bias=False)
            self.dilated = nn.Conv2d(10, 7, 3, padding=2, dilation=2, stride=2)
            self.head = nn.Linear(7, 3)

        def forward(self, x):
            x = F.gelu(self.grouped(x))
            x = F.hardswish(self.dilated(self.reflected(x)))
            return self.head(x.mean((2, 3)))

    frozen = quick(Odd().eval(), torch.randn(2, 6, 9, 8), min_gain=ALL_DENSE)
    frozen.export(tmp_path / "odd.skd")
    x = torch.randn(3, 6, 9, 8)
    got = sparsekd.runtime.Session(tmp_path / "odd.skd", threads=1)(x.numpy())
    torch.testing.assert_close(torch.from_numpy(got), frozen(x), rtol=1e-4, atol=1e-5)


class Encoder(nn.Module):
    """A small transformer: tokens and positions, attention written out, pooled."""

    def __init__(self, width=32, heads=4, length=10):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(50, width), nn.Parameter(torch.randn(length, width))
        self.heads, self.norm1, self.norm2 = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.mixed, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.head = nn.Linear(width, 2)

    def forward(self, ids):
        x = self.tokens(ids) + self.positions
        batch, length, width = x.shape
        q, k, v = self.mixed(self.norm1(x)).chunk(3, -1)
        split = lambda y: y.view(batch, length, self.heads, width // self.heads).transpose(1, 2)  # noqa: E731
        y = F.scaled_dot_product_attention(split(q), split(k), split(v)).transpose(1, 2).reshape(batch, length, width)
        x = x + self.out(y)
        x = x + self.narrow(F.gelu(self.wide(self.norm2(x))))
        return {"scores": self.head(x[:, 0]).softmax(-1), "states": x}


class Recommender(nn.Module):
    """Dense features and ids, joined by their pairwise products: the shape of DLRM."""

    def __init__(self, dim=16):
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(20 + i, dim) for i in range(3))
        self.bottom = nn.Sequential(nn.Linear(5, 32), nn.ReLU(), nn.Linear(32, dim), nn.ReLU())
        self.top = nn.Sequential(nn.Linear(dim + 6, 16), nn.ReLU(), nn.Linear(16, 1), nn.Sigmoid())
        self.register_buffer("pairs", torch.triu_indices(4, 4, 1))

    def forward(self, dense, ids):
        x = self.bottom(dense)
        rows = torch.stack([x, *(table(ids[:, i]) for i, table in enumerate(self.tables))], 1)
        products = torch.bmm(rows, rows.transpose(1, 2))
        return self.top(torch.cat([x, products[:, self.pairs[0], self.pairs[1]]], 1)).squeeze(1)


@pytest.mark.parametrize("sparse", [False, True])
def test_an_encoder_and_a_recommender(sparse, tmp_path):
    cases = {
        "encoder": (Encoder(), {"ids": torch.randint(50, (3, 10))}),
        "recommender": (Recommender(), {"dense": torch.randn(3, 5), "ids": torch.randint(20, (3, 3))}),
    }
    for name, (model, inputs) in cases.items():
        model = model.eval()
        if sparse:
            sparsekd.sparsify(model, density=0.5)
        frozen = quick(model, inputs)
        path = tmp_path / f"{name}.skd"
        frozen.export(path)
        session = sparsekd.runtime.Session(path)
        assert [one.name for one in session.inputs] == list(inputs)
        want = frozen(**inputs)
        got = session.run({one: x.numpy() for one, x in inputs.items()})
        want = want if isinstance(want, dict) else {"output": want}
        for key, y in want.items():
            np.testing.assert_allclose(got[key], y.numpy(), rtol=1e-4, atol=1e-5)
        loaded = sparsekd.load_frozen(path)(**inputs)
        assert (set(loaded) == set(want)) if isinstance(loaded, dict) else name == "recommender"


@pytest.mark.parametrize("table", ["dense", "sparse"])
@pytest.mark.parametrize("kind", [sparsekd.models.DLRM, sparsekd.models.WideAndDeep])
def test_click_models_of_the_library(kind, table, tmp_path):
    """Their ids are hashed in the file too, whatever int64 they are."""
    model = sparsekd.sparsify(kind(4, 3, rows=50, table=table).eval(), density=0.5)
    numbers, ids = torch.randn(5, 4) * 9, torch.randint(-(2**63), 2**63 - 1, (5, 3))
    frozen = quick(model, (numbers, ids))
    frozen.export(tmp_path / "clicks.skd")
    got = sparsekd.runtime.Session(tmp_path / "clicks.skd")(numbers.numpy(), ids.numpy())
    np.testing.assert_allclose(got, frozen(numbers, ids).numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_of_a_network_in_bfloat16(mode, tmp_path):
    model = nn.Sequential(nn.EmbeddingBag(50, 16, mode=mode), nn.Linear(16, 4)).eval()
    frozen = quick(model, torch.randint(50, (3, 5)), dtype="bf16")
    frozen.export(tmp_path / "bags.skd")
    ids = torch.randint(50, (7, 5))
    got, want = torch.from_numpy(sparsekd.runtime.Session(tmp_path / "bags.skd")(ids.numpy())), frozen(ids)
    assert float((got - want).abs().max()) < 0.02 * float(want.abs().max())


def test_networks_of_the_library_for_small_images(tmp_path):
    """MobileNetV3's and EfficientNet's parts: squeeze and excitation, hardswish, hardsigmoid, SiLU."""

    class Excited(nn.Module):
        def __init__(self, act, gate):
            super().__init__()
            self.stem, self.bn = nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16)
            self.down, self.up = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)
            self.depthwise = nn.Conv2d(16, 16, 5, padding=2, groups=16)
            self.act, self.gate, self.head = act, gate, nn.Linear(16, 4)

        def forward(self, x):
            x = self.act(self.bn(self.stem(x)))
            y = self.act(self.depthwise(x))
            y = y * self.gate(self.up(F.relu(self.down(F.adaptive_avg_pool2d(y, 1)))))
            return self.head((x + y).mean((2, 3)))

    for act, gate in ((nn.Hardswish(), nn.Hardsigmoid()), (nn.SiLU(), nn.Sigmoid())):
        frozen = quick(trained(Excited(act, gate)).eval(), torch.randn(2, 3, 16, 16))
        frozen.export(tmp_path / "excited.skd")
        x = torch.randn(5, 3, 16, 16)
        got = sparsekd.runtime.Session(tmp_path / "excited.skd")(x.numpy())
        torch.testing.assert_close(torch.from_numpy(got), frozen(x), rtol=1e-4, atol=1e-5)


NO_TORCH = """
import sys
import numpy as np
from sparsekd.runtime import Session
session = Session(sys.argv[1], threads=2)
np.save(sys.argv[3], session(np.load(sys.argv[2])))
assert "torch" not in sys.modules and "safetensors" not in sys.modules, "something else was imported"
"""


def test_a_process_without_torch_gives_the_same_bits(monkeypatch, tmp_path):
    frozen, x = frozen_network("resnet", monkeypatch)
    frozen.export(tmp_path / "student.skd")
    np.save(tmp_path / "x.npy", x.numpy())
    arguments = [tmp_path / name for name in ("student.skd", "x.npy", "y.npy")]
    subprocess.run([sys.executable, "-c", NO_TORCH, *map(str, arguments)], check=True, timeout=60)
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), frozen(x).numpy())


def test_the_rating_network_takes_its_inputs_by_name(monkeypatch, tmp_path):
    sizes = {"user_features": 30, "item_features": 22}
    model = trained(RatingCNN(sizes, STUDENT)).eval()
    nn.init.normal_(model.linear.weight)
    sparsekd.sparsify(model, density=0.5)
    ours_throughout(monkeypatch)
    given = [torch.randn(6, 30), torch.randn(6, 22), torch.randn(6)]
    frozen = quick(model, given, memory_format="channels_last")
    frozen.export(tmp_path / "rating.skd")
    session = sparsekd.runtime.Session(tmp_path / "rating.skd", threads=1)
    said = ["user_features: float32 [N, 30]", "item_features: float32 [N, 22]", "prior: float32 [N]"]
    assert list(map(str, session.inputs)) == said and session.threads == 1 and session.note == ""
    names = [one.name for one in session.inputs]
    for batch in (1, 6):
        some = [x[:batch] for x in given]
        result = session.run({name: x.numpy() for name, x in zip(names, some, strict=True)})
        assert result.keys() == {"output"}
        torch.testing.assert_close(torch.from_numpy(result["output"]), frozen(*some), rtol=1e-6, atol=1e-6)
