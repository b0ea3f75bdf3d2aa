"""The state file of a training: what it keeps beside the parts that it is given."""

import pytest
import torch
from torch.optim import AdamW

from sparsekd.runs.state import StateFile, check_same_settings


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


def test_a_resumed_channels_last_network_steps_as_if_it_had_not_stopped(tmp_path):
    """The moments come back contiguous, and AdamW's fused kernel reads them in the order in which they lie."""
    torch.manual_seed(0)
    batches = torch.randn(4, 2, 3, 6, 6)

    def network():
        conv = torch.nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
        return conv, AdamW(conv.parameters(), lr=0.01, fused=True)

    def steps(conv, optimizer, batches):
        for images in batches:
            optimizer.zero_grad()
            conv(images).square().mean().backward()
            optimizer.step()

    whole, optimizer = network()
    steps(whole, optimizer, batches[:2])
    StateFile(tmp_path / "state", {"model": whole, "optimizer": optimizer}, {}).save([{"epoch": 1}])
    steps(whole, optimizer, batches[2:])
    resumed, another = network()
    assert StateFile(tmp_path / "state", {"model": resumed, "optimizer": another}, {}).resume()
    moments = another.state[resumed.weight]
    assert moments["exp_avg"].stride() == moments["exp_avg_sq"].stride() == resumed.weight.stride()
    steps(resumed, another, batches[2:])
    assert torch.equal(resumed.weight, whole.weight)


def test_a_folder_begun_without_views_is_not_gone_on_with_in_views(tmp_path):
    check_same_settings(tmp_path, {"seed": 1}, {"seed": 1, "added_later": 2})
    with pytest.raises(ValueError, match="its views is 0, now 12; give another --out"):
        check_same_settings(tmp_path, {"seed": 1}, {"seed": 1, "views": 12})
    with pytest.raises(ValueError, match="its views is 12, now 0"):
        check_same_settings(tmp_path, {"seed": 1, "views": 12}, {"seed": 1})
