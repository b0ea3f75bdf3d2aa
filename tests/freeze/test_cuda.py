"""`freeze` for a GPU without one: kernels are interpreted, and what a CUDA graph would hold runs as it is."""

import importlib
import os
from unittest import mock

import pytest
import torch
from torch import nn

import sparsekd
from sparsekd import BlockPattern
from sparsekd.backends import cuda as backend
from sparsekd.backends.cuda import choose, masks, plan

pytest.importorskip("triton")
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
with mock.patch.dict(os.environ, {} if GPU else {"TRITON_INTERPRET": "1"}):
    from sparsekd.kernels import gather_gemm

freezing, on_cuda, on_cuda_layer = (  # `sparsekd.freeze` itself is a function to those who have called it
    importlib.import_module(f"sparsekd.freeze.{name}") for name in ("freeze", "cuda", "cuda_layer")
)


class Net(nn.Module):
    """Every kind of site: fused norm and activation, a residual, a refused layer, a dense one, a linear one."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU6())
        self.conv = nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(32)
        self.conv2 = nn.Conv2d(32, 32, 1)
        self.dense = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.head = nn.Linear(32, 16)

    def forward(self, x):
        x = torch.nn.functional.silu(self.norm(self.conv(self.stem(x))))
        x = torch.relu(self.conv2(x) + x)
        return self.head(self.dense(x).mean((2, 3)))


def falling_times(calls, *_, **__):
    """Dense comes first and is slowest, by more than a choice must gain, so that the kernels are what runs."""
    for call in calls.values():
        call()
    return {name: 1e-4 * 0.9**place for place, name in enumerate(calls)}


@pytest.fixture
def captured(monkeypatch, tmp_path):
    """What would be captured as graphs, by input shapes; on a GPU they really are."""
    monkeypatch.setenv("SPARSEKD_PLAN", str(tmp_path / "plan.json"))
    choose.plan_of.cache_clear()
    masks.masks.clear()
    shapes = []
    real = on_cuda.capture

    def capture(run, inputs):
        shapes.append([tuple(x.shape) for x in inputs])
        return real(run, inputs) if GPU else run

    monkeypatch.setattr(on_cuda, "capture", capture)
    if not GPU:
        monkeypatch.setattr(freezing, "is_on_gpu", lambda inputs: True)
    for module in (plan, on_cuda_layer):
        monkeypatch.setattr(module, "medians", falling_times)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    yield shapes
    choose.plan_of.cache_clear()


def network():
    torch.manual_seed(0)
    net = Net()
    for norm in (net.stem[1], net.norm):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    sparsekd.sparsify(net, BlockPattern(16, 16), density=0.6, exclude=["dense"])
    return net.to(DEVICE).eval()


def test_a_network_is_folded_fused_chosen_and_captured(captured, monkeypatch):
    made, launched = gather_gemm.GatherGemm.__init__, []

    def make(self, *operands, **options):
        self.activation = options["activation"] if not options["transposed"] else None
        made(self, *operands, **options)

    run = gather_gemm.GatherGemm.__call__

    def call(self, x, values, out, bias=None, residual=None):
        launched.append((self.activation, residual is not None))
        return run(self, x, values, out, bias, residual)

    monkeypatch.setattr(gather_gemm.GatherGemm, "__init__", make)
    monkeypatch.setattr(gather_gemm.GatherGemm, "__call__", call)
    net, x = network(), torch.randn(2, 3, 6, 6, device=DEVICE)
    frozen = sparsekd.freeze(net, x)
    assert isinstance(frozen, on_cuda.FrozenCudaModel)
    chosen = {layer.name: (layer.chosen, layer.geometry.fused) for layer in frozen.plan}
    assert chosen == {
        "stem.0": ("dense", "bn+relu6"),
        "conv": ("sparse", "bn+silu"),
        "conv2": ("sparse", "add+relu"),
        "dense": ("dense", ""),
        "head": ("sparse", ""),
    }
    assert "3 input and 16 output channels" in frozen.plan["stem.0"].why
    assert "was fastest" in frozen.plan["conv"].why and frozen.plan["conv"].dense_us > frozen.plan["conv"].sparse_us
    assert "in CUDA graphs" in str(frozen.plan) and set(frozen.plan.network_us) == {"unfrozen", "frozen"}
    launched.clear()
    torch.testing.assert_close(frozen(x), net(x), rtol=1e-3, atol=1e-3)
    if GPU:
        return  # there a replay launches nothing
    assert launched[:3] == [("silu", False), ("relu", True), (None, False)]  # the frozen network; the model's follow


def test_the_library_searches_its_own_kernels_wherever_it_is_compared_with(captured, monkeypatch):
    searched = []

    def medians(calls, *_, **__):
        searched.append(torch.backends.cudnn.benchmark)
        return falling_times(calls)

    for module in (plan, on_cuda_layer, on_cuda):
        monkeypatch.setattr(module, "medians", medians)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    sparsekd.freeze(network(), torch.randn(2, 3, 6, 6, device=DEVICE))
    assert len(searched) >= 3 and all(searched) and torch.backends.cudnn.benchmark is False


def test_each_batch_size_is_captured_once(captured):
    net = network()
    frozen = sparsekd.freeze(net, torch.randn(2, 3, 6, 6, device=DEVICE))
    for count in (2, 5, 5, 2):
        x = torch.randn(count, 3, 6, 6, device=DEVICE)
        torch.testing.assert_close(frozen(x), net(x), rtol=1e-3, atol=1e-3)
    assert captured == [[(2, 3, 6, 6)], [(5, 3, 6, 6)]]


def test_the_graphs_of_the_sizes_that_came_last_are_kept(captured, monkeypatch):
    monkeypatch.setattr(on_cuda, "MOST_GRAPHS", 2)
    net = network()
    frozen = sparsekd.freeze(net, torch.randn(1, 3, 6, 6, device=DEVICE))
    for count in (2, 1, 3, 1, 2):  # 3 takes the place of 2, and 2 that of 3
        x = torch.randn(count, 3, 6, 6, device=DEVICE)
        torch.testing.assert_close(frozen(x), net(x), rtol=1e-3, atol=1e-3)
    assert [shapes[0][0] for shapes in captured] == [1, 2, 3, 2]


def test_what_cannot_be_asked_of_a_gpu_is_refused(captured, tmp_path):
    net, x = network(), torch.randn(2, 3, 6, 6, device=DEVICE)
    for option in ({"threads": 2}, {"min_gain": 0.0}, {"memory_format": "contiguous"}):
        with pytest.raises(ValueError, match=f"{next(iter(option))} is for the CPU"):
            sparsekd.freeze(net, x, **option)
    frozen = sparsekd.freeze(net, x)
    with pytest.raises(RuntimeError, match="not kept in files"):
        frozen.save(tmp_path / "net.frozen")
    with pytest.raises(TypeError, match="on the device it was frozen on"):
        frozen(x.to("meta"))


def test_outputs_may_differ_as_tf32_does_where_torch_takes_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for allowed, tolerance in ((True, on_cuda.TF32_TOLERANCE), (False, None)):
        monkeypatch.setattr(backend, "allows_tf32", lambda conv, allowed=allowed: allowed)
        assert on_cuda.tolerance_of({"y": torch.zeros(2)}) == tolerance
        assert on_cuda.tolerance_of(torch.zeros(2, dtype=torch.bfloat16)) is None


def test_inputs_elsewhere_than_the_model_are_refused():
    with pytest.raises(ValueError, match=r"on the CPU like its inputs, got weight on meta; use model.to\('cpu'\)"):
        sparsekd.freeze(nn.Linear(3, 3, device="meta"), torch.randn(2, 3))
    with pytest.raises(ValueError, match="expected all inputs on the CPU, or all on one GPU"):
        sparsekd.freeze(nn.Linear(3, 3), torch.randn(2, 3, device="meta"))


@pytest.mark.skipif(GPU, reason="what happens without a GPU")
def test_the_graph_is_filled_and_read_around_the_replay(monkeypatch):
    """The boundary to CUDA: static inputs get the new data before a replay, outputs are copied out after it."""
    graph, seen = mock.MagicMock(), []
    stream = mock.MagicMock()
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda side: mock.MagicMock())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda which: mock.MagicMock(__exit__=lambda *error: False))
    held = torch.zeros(2, 3, 4, 4)

    def run(x):
        seen.append(x)
        return {"y": held}

    replay = on_cuda.capture(run, (torch.zeros(2, 3, 4, 4),))
    assert len(seen) == 4 and len({id(x) for x in seen}) == 1
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    graph.replay.side_effect = lambda: held.copy_(2 * seen[0])
    first, second = (replay(torch.full((2, 3, 4, 4), float(value)))["y"] for value in (1, 5))
    assert first.unique().tolist() == [2.0] and second.unique().tolist() == [10.0]

    def failing(x):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(torch.cuda, "stream", lambda side: mock.MagicMock(__exit__=lambda *error: True))
    with pytest.raises(RuntimeError, match=r"cannot be captured in a CUDA graph \(operation not permitted"):
        on_cuda.capture(failing, (torch.zeros(1),))
