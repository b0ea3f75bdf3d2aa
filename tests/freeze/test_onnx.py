"""ONNX files of sparse and frozen networks, run by ONNX Runtime."""

import numpy as np
import pytest
import torch

import sparsekd

from .networks import Mlp, ResNet, quick, trained

pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


@pytest.mark.parametrize("build, shape", [(ResNet, (2, 3, 8, 8)), (Mlp, (2, 20))], ids=["resnet", "mlp"])
@pytest.mark.parametrize("frozen", [False, True])
def test_onnx_runtime_gives_the_same_numbers(build, shape, frozen, tmp_path):
    model, x = trained(build()).eval(), torch.randn(shape)
    sparsekd.sparsify(model, density=0.5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    path = tmp_path / "model.onnx"
    sparsekd.export_onnx(quick(model, x) if frozen else model, path, x)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    given = torch.randn(5, *shape[1:])
    name = "x" if build is ResNet else "input"
    (got,) = session.run(["output"], {name: given.numpy()})
    np.testing.assert_allclose(got, model(given).detach().numpy(), rtol=1e-3, atol=1e-4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class Nested(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = torch.nn.Linear(20, 8), torch.nn.Linear(20, 3)

    def forward(self, x):
        y = self.one(x)
        return {"z": {"b": self.two(x), "a": y}, "c": [y + 1, (y * 2,)]}


@pytest.mark.parametrize("frozen", [False, True])
def test_tensors_in_dicts_of_dicts_are_outputs_in_their_order(frozen, tmp_path):
    model, x = Nested().eval(), torch.randn(2, 20)
    sparsekd.export_onnx(quick(model, x) if frozen else model, tmp_path / "model.onnx", x)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    result = model(x)
    wanted = [result["z"]["b"], result["z"]["a"], result["c"][0], result["c"][1][0]]
    assert [one.name for one in session.get_outputs()] == [f"output_{i}" for i in range(4)]
    for got, want in zip(session.run(None, {session.get_inputs()[0].name: x.numpy()}), wanted, strict=True):
        np.testing.assert_allclose(got, want.detach().numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("build, shape", [(ResNet, (2, 3, 8, 8)), (Mlp, (2, 20))], ids=["resnet", "mlp"])
def test_a_network_frozen_in_bfloat16_is_one_of_float32(build, shape, tmp_path):
    model, x = trained(build()).eval(), torch.randn(shape)
    frozen = quick(model, x, dtype="bf16")
    before = frozen(x)
    sparsekd.export_onnx(frozen, tmp_path / "model.onnx", x)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    want = model(x).detach().numpy()
    np.testing.assert_allclose(got, want, rtol=0, atol=0.05 * float(abs(want).max()))
    assert torch.equal(frozen(x), before)


def test_a_network_that_asks_for_bfloat16_itself_is_refused(tmp_path):
    class Asks(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.weight = torch.nn.Linear(20, 8), torch.nn.Parameter(torch.randn(8, 8))

        def forward(self, x):
            y = self.layer(x)
            if y.shape[1] != 8:  # so that torch.export traces it, which writes the type down
                return y
            return torch.tanh(y.float()).to(self.weight.dtype) @ self.weight

    frozen = quick(Asks().eval(), torch.randn(2, 20), dtype="bf16")
    with pytest.raises(ValueError, match=r"sparsekd.export_onnx: .*frozen in bfloat16.*without dtype"):
        sparsekd.export_onnx(frozen, tmp_path / "model.onnx", torch.randn(2, 20))
    assert not list(tmp_path.iterdir())


def test_errors_of_torch_name_it(tmp_path):
    model, x = trained(Mlp()).eval(), torch.randn(2, 20)
    sparsekd.sparsify(model, density=0.5)
    for network in (model, quick(model, x)):
        with pytest.raises(Exception, match=r"sparsekd\.export_onnx"):
            torch.onnx.export(network, (x,), str(tmp_path / "model.onnx"), dynamo=False)
