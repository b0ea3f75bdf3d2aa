"""The state file of a training: what it keeps beside the parts that it is given."""

import torch

from sparsekd.runs.state import StateFile


def test_the_generator_of_the_gpu_goes_on_too(tmp_path, monkeypatch):
    generators = {"cuda:1": torch.tensor([1, 2, 3], dtype=torch.uint8)}
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: generators[str(device)].clone())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: generators.update({str(device): state}))
    file = StateFile(tmp_path / "state", {}, {}, "cuda:1")
    file.save([{"epoch": 1}])
    generators["cuda:1"] = torch.tensor([9, 9, 9], dtype=torch.uint8)
    assert file.resume() == [{"epoch": 1}]
    assert generators["cuda:1"].tolist() == [1, 2, 3]


def test_a_state_from_a_cpu_is_read_where_no_gpu_drew(tmp_path):
    torch.manual_seed(3)
    file = StateFile(tmp_path / "state", {}, {})
    file.save([])
    drawn = torch.rand(4)
    assert file.resume() == [] and torch.equal(torch.rand(4), drawn)
