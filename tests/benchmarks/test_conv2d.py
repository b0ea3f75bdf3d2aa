"""`benchmarks.conv2d`: each pass is compared with dense torch, then timed."""

import json

import pytest
import torch

import sparsekd
from benchmarks import conv2d
from benchmarks.lib import shapes


@pytest.mark.parametrize("dtype", conv2d.DTYPES)
def test_layers_are_compared_with_dense_torch_and_timed(dtype, tmp_path, monkeypatch, capsys):
    if dtype == "int8" and "avx512_vnni" not in sparsekd._C.isas():
        pytest.skip("torch's quantised convolution saturates sums of two products on this CPU")
    monkeypatch.setattr(conv2d, "CONVS", [shapes.Conv("cifar", 16, 6, 64, 3, 2)])
    monkeypatch.setattr(conv2d, "LINEARS", [shapes.Linear("mlp", 32, 64)])
    path = tmp_path / "rows.json"
    conv2d.main(["--dtype", dtype, "--density", "0.5", "--batch", "2", "--seconds", "0.001", "--json", str(path)])
    rows = {row["op"].partition("_")[0]: row for row in json.loads(path.read_text())["rows"]}
    assert set(rows) == ({"conv2d"} if dtype == "int8" else {"conv2d", "linear"})
    assert all(("grad_values" in row) == (dtype == "float32") for row in rows.values())
    best = rows["conv2d"]["forward"]
    assert all(best["dense_us"] <= best.get(f"{peer}_us", best["dense_us"]) for peer in ("fp32", "bf16", "int8"))
    assert f"conv2d{'' if dtype == 'float32' else '_' + dtype} forward" in capsys.readouterr().out


def test_a_layer_that_disagrees_with_dense_torch_is_not_timed():
    one = conv2d.Pass(lambda: torch.tensor([1.0, 2.0]), {"fp32": lambda: torch.tensor([1.0, 2.1])})
    conv2d.check("forward", one, 0.05)
    with pytest.raises(RuntimeError, match="forward differs from dense torch in fp32 by"):
        conv2d.check("forward", one, 0.04)
