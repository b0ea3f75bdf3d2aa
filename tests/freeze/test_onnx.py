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


def test_errors_of_torch_name_it(tmp_path):
    model, x = trained(Mlp()).eval(), torch.randn(2, 20)
    sparsekd.sparsify(model, density=0.5)
    for network in (model, quick(model, x)):
        with pytest.raises(Exception, match=r"sparsekd\.export_onnx"):
            torch.onnx.export(network, (x,), str(tmp_path / "model.onnx"), dynamo=False)
