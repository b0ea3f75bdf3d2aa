"""The whole-network benchmark: models of the published sizes, and nothing timed that computes something else."""

import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import sparsekd
from benchmarks import networks
from benchmarks.lib.models import MobileNetV2, resnet50
from benchmarks.networks import Contestant
from benchmarks.suites.compact import count_weights


@pytest.mark.parametrize(("build", "millions"), [(resnet50, 25.50), (MobileNetV2, 3.47)])
def test_models_have_the_published_sizes(build, millions):
    model = build()
    assert count_weights(model) / 1e6 == pytest.approx(millions, abs=0.01)
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 1000)


def test_the_command_times_and_keeps_what_it_found(tmp_path, monkeypatch, capsys):
    out = tmp_path / "networks.json"
    arguments = "--network wrn-16-2-n1 --density 0.3 --skip compiled openvino onnxruntime mnn mnn-sparse ncnn"
    arguments += " --seconds 0.01 --rounds 2"
    arguments += f" --threads {torch.get_num_threads()}"
    monkeypatch.setattr(sys, "argv", ["networks", *arguments.split(), "--out", str(out)])
    networks.main()
    rows = {row["name"]: row for row in json.loads(out.read_text())["rows"]}
    assert set(rows) == {"eager fp32", "deepsparse fp32 0.3", "frozen fp32", "ours fp32 0.3"}
    ours = rows["ours fp32 0.3"]
    assert ours["ms"] > 0 and ours["deviation"] < 1e-3 and set(ours["speedup"]) == {"eager fp32", "frozen fp32"}
    assert f"| ours fp32 0.3 | {ours['ms']:.3f} |" in capsys.readouterr().out


def test_a_budget_is_what_the_whole_network_keeps():
    ours = Contestant("resnet18-n1", "ours", "fp32", 1.0, "macs=0.3")
    model, x = ours.model()
    dense, now = sparsekd.pruning.count_macs(model, (x,), ["stem*"])
    assert now / dense == pytest.approx(0.3, abs=0.01) and ours.name == "ours fp32 macs=0.3"
    assert len({layer.density for layer in model.modules() if hasattr(layer, "block_mask")}) > 5  # not all alike
    field = networks.contestants("resnet18-n1", ["fp32"], [1.0], ["deepsparse", "mnn-sparse"], ["macs=0.3"])
    assert field[-1] == ours and sum(one.runtime == "ours" for one in field) == 2


@pytest.mark.parametrize("runtime, file", [("mnn", "network.mnn"), ("mnn-sparse", "network-sparse.mnn")])
def test_mnn_runs_what_its_converter_wrote(runtime, file, monkeypatch):
    def convert(folder, wanted):
        assert (folder / "network.onnx").read_bytes() == b"a network" and wanted == file
        (folder / file).write_text("converted")
        return ""

    def serve(path, names, shapes, threads):
        assert names == ["x"] and shapes == [(1, 3, 32, 32)] and threads == 1
        written = Path(path).read_text()
        return lambda arrays: np.full(arrays[0].shape[0], float(written == "converted"), np.float32)

    exported = b"a network", torch.zeros(1, 3, 32, 32).numpy()  # torch's exporter needs a package of its own
    monkeypatch.setattr(networks, "_onnx", lambda one: exported)
    monkeypatch.setattr(networks, "convert_for_mnn", convert)
    monkeypatch.setattr(networks.serve, "mnn", serve)
    call = networks.RUNTIMES[runtime][0](Contestant("wrn-16-2-n1", runtime, "fp32", 0.5), 1)
    assert call().tolist() == [1.0]
    monkeypatch.setattr(networks, "convert_for_mnn", lambda *_: "ModuleNotFoundError: No module named 'MNN'")
    with pytest.raises(RuntimeError, match="No module named 'MNN'"):
        networks.RUNTIMES[runtime][0](Contestant("wrn-16-2-n1", runtime, "fp32", 0.5), 1)


def test_ncnn_is_asked_for_one_image_alone(monkeypatch):
    for module in ("ncnn", "pnnx"):
        monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
    monkeypatch.setattr(networks, "_onnx", lambda one: (b"a network", np.zeros((64, 3, 32, 32), np.float32)))
    with pytest.raises(RuntimeError, match="one image at a time"):
        networks.ncnn(Contestant("wrn-16-2-n64", "ncnn", "fp32", 1.0), 1)


class Team:
    """Workers in this process: one contestant is wrong, one cannot be built."""

    def ask(self, process, what, one, *_):
        if one.runtime == "openvino":
            raise RuntimeError("ModuleNotFoundError: No module named 'openvino'")
        if what == "window":
            return [{"eager": 4e-3, "ours": 1e-3}[one.runtime]] * 3
        return np.ones(3) * (1.2 if one.runtime == "onnxruntime" else 1.0)


def test_wrong_and_missing_contestants_are_named_and_not_timed():
    field = [Contestant("any", runtime, "fp32", 1.0) for runtime in ("eager", "openvino", "onnxruntime", "ours")]
    rows = {row["runtime"]: row for row in networks.contest(Team(), field, 0.0, 3)}
    assert rows["openvino"]["absent"] == "ModuleNotFoundError: No module named 'openvino'"
    assert "differs from PyTorch's by 0.2" in rows["onnxruntime"]["absent"]
    assert rows["ours"]["ms"] == 1.0 and rows["ours"]["speedup"] == {"eager fp32": 4.0}
    assert "| ours fp32 1 | 1.000 | 4.00 |" in networks.table(list(rows.values()))
