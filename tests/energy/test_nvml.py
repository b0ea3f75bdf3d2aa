"""NVML on a fake of nvidia-ml-py."""

import itertools
import sys
import time

import pytest

from sparsekd.energy import EnergyMeter

from .hardware import Board, FakeNVML, assert_unavailable, gpu_meter, make_machine


def test_nvml_counters_of_several_gpus(board):
    nvml = FakeNVML(board, gpus=3)
    with gpu_meter(board, nvml) as meter:
        board.advance(2.0, watts=100.0)
    assert meter.reading.source == "nvml-counter"
    assert meter.reading.per_device == pytest.approx({"cuda:0": 200.0, "cuda:1": 400.0, "cuda:2": 600.0}, rel=0.02)
    assert meter.reading.joules == pytest.approx(1200.0, rel=0.02)
    assert 90 <= meter.reading.ticks <= 100
    assert nvml.opened == 0


@pytest.mark.parametrize(
    ("device", "environ", "watts"),
    [
        ("cuda:1", {}, 2),
        (["cuda:0", "cuda:2"], {}, 4),
        ("cuda", {"CUDA_VISIBLE_DEVICES": "2,0"}, 4),
        ("cuda:0", {"CUDA_VISIBLE_DEVICES": "2,0"}, 3),
        ("cuda", {"CUDA_VISIBLE_DEVICES": "GPU-1"}, 2),
        ("cuda", {"CUDA_VISIBLE_DEVICES": "1,-1,0"}, 2),
    ],
)
def test_the_gpus_asked_for_are_the_ones_cuda_numbers(board, device, environ, watts):
    with gpu_meter(board, FakeNVML(board, gpus=3), device, environ) as meter:
        board.advance(2.0, watts=100.0)
    assert meter.reading.watts == pytest.approx(100.0 * watts, rel=0.02)


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_no_visible_gpu(board, hidden):
    nvml = FakeNVML(board, gpus=2)
    with gpu_meter(board, nvml, environ={"CUDA_VISIBLE_DEVICES": hidden}) as meter:
        pass
    assert_unavailable(meter.reading, "no GPU is visible")
    assert nvml.opened == 0


def test_a_gpu_that_is_not_there(board):
    with gpu_meter(board, FakeNVML(board, gpus=1), "cuda:1") as meter:
        pass
    assert_unavailable(meter.reading, "cuda:1", "1 GPU(s)")


def test_gpus_of_several_models_need_an_order(board):
    nvml = FakeNVML(board, gpus=2, names=("L4", "H200"))
    with gpu_meter(board, nvml, "cuda:0") as meter:
        board.advance(2.0)
    assert_unavailable(meter.reading, "CUDA_DEVICE_ORDER=PCI_BUS_ID")
    with gpu_meter(board, nvml, "cuda:0", {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}) as meter:
        board.advance(2.0)
    assert meter.reading.source == "nvml-counter"
    machine = make_machine(board, nvml=nvml, cuda_uuids=lambda: ["GPU-1", "GPU-0"])  # CUDA's own order: fastest first
    with EnergyMeter("cuda:0", machine=machine) as meter:
        board.advance(2.0, watts=100.0)
    assert meter.reading.watts == pytest.approx(200.0, rel=0.02)


@pytest.mark.parametrize(("code", "fix"), [(9, "modprobe nvidia"), (12, "driver"), (18, "restart"), (4, "/dev/nvidia")])
def test_nvml_that_does_not_start_names_the_fix(board, code, fix):
    nvml = FakeNVML(board)
    nvml.fails["nvmlInit"] = code
    with gpu_meter(board, nvml) as meter:
        pass
    assert_unavailable(meter.reading, fix)
    assert meter.reading.reason.count("nvmlInit") == 1  # the same reason of two sources is said once


def test_missing_nvidia_ml_py_names_the_fix(board, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with EnergyMeter("cuda", machine=make_machine(board, nvml=None)) as meter:
        pass
    assert_unavailable(meter.reading, "pip install nvidia-ml-py")


def test_no_counter_falls_to_the_power_integral(board):
    nvml = FakeNVML(board)
    nvml.fails["nvmlDeviceGetTotalEnergyConsumption"] = 3
    board.watts = 120.0
    with gpu_meter(board, nvml) as meter:
        board.advance(10.0, watts=120.0)
    assert meter.reading.source == "nvml-power-integral"
    assert meter.reading.joules == pytest.approx(1200.0)
    assert nvml.opened == 0


def test_one_gpu_without_a_counter_integrates_all(board):
    nvml = FakeNVML(board, gpus=2)
    nvml.fails_on["nvmlDeviceGetTotalEnergyConsumption", 1] = 3
    with gpu_meter(board, nvml) as meter:
        board.advance(10.0)
    assert meter.reading.source == "nvml-power-integral" and set(meter.reading.per_device) == {"cuda:0", "cuda:1"}


def test_average_power_needs_longer_windows(board):
    nvml = FakeNVML(board)
    nvml.fails |= {"nvmlDeviceGetTotalEnergyConsumption": 3, "nvmlDeviceGetFieldValues": 3}
    meter = gpu_meter(board, nvml)
    assert meter.required_seconds == pytest.approx(50.0)
    meter.close()
    del nvml.fails["nvmlDeviceGetFieldValues"]
    assert meter.required_seconds == pytest.approx(5.0)
    meter.close()


def test_no_permission_for_either(board):
    nvml = FakeNVML(board)
    nvml.fails |= {
        "nvmlDeviceGetTotalEnergyConsumption": 4,
        "nvmlDeviceGetFieldValues": 4,
        "nvmlDeviceGetPowerUsage": 4,
    }
    with gpu_meter(board, nvml) as meter:
        board.advance(1.0)
    assert_unavailable(meter.reading, "nvml-counter", "nvml-power-integral", "/dev/nvidia")
    assert nvml.opened == 0


def test_a_counter_that_stands_still_falls_to_power(board):
    nvml = FakeNVML(board)
    nvml.frozen.add(0)
    with gpu_meter(board, nvml) as meter:
        board.advance(10.0)
    assert meter.reading.source == "nvml-power-integral"
    with gpu_meter(board, nvml, source="nvml-counter") as meter:
        board.advance(10.0)
    assert_unavailable(meter.reading, "cuda:0", "stands still")


def test_a_counter_that_stops_inside_the_window(board):
    nvml = FakeNVML(board)
    meter = gpu_meter(board, nvml)
    with meter.window() as before:
        board.advance(2.0)
    with meter.window() as window:
        nvml.frozen.add(0)
        board.advance(2.0)
    meter.close()
    assert before.reading.joules > 0
    assert_unavailable(window.reading)
    assert window.reading.per_device == {"cuda:0": None}


def test_a_gpu_lost_inside_the_window(board):
    nvml = FakeNVML(board, gpus=2)
    with gpu_meter(board, nvml) as meter:
        board.advance(2.0, watts=100.0)
        nvml.fails_on["nvmlDeviceGetTotalEnergyConsumption", 1] = 15
    assert_unavailable(meter.reading, "cuda:1", "Xid")
    assert meter.reading.per_device == {"cuda:0": pytest.approx(200.0, rel=0.02), "cuda:1": None}
    assert meter.reading.seconds == pytest.approx(2.0)


def test_a_driver_loaded_anew_inside_the_window_is_no_negative_energy(board):
    nvml = FakeNVML(board)
    with gpu_meter(board, nvml) as meter:
        board.advance(2.0, watts=100.0)
        nvml.nvmlDeviceGetTotalEnergyConsumption = lambda handle: 5  # millijoules, counted from the start again
    assert_unavailable(meter.reading, "cuda:0", "reset")


def test_mig_is_refused(board):
    nvml = FakeNVML(board)
    nvml.mig = 1
    with gpu_meter(board, nvml) as meter:
        board.advance(2.0)
    assert_unavailable(meter.reading, "MIG", "nvidia-smi -mig 0")
    with gpu_meter(board, FakeNVML(board), environ={"CUDA_VISIBLE_DEVICES": "MIG-12ab"}) as meter:
        board.advance(2.0)
    assert_unavailable(meter.reading, "MIG-12ab")


def test_a_gpu_without_mig_is_no_error(board):
    nvml = FakeNVML(board)
    nvml.fails["nvmlDeviceGetMigMode"] = 3
    with gpu_meter(board, nvml) as meter:
        board.advance(2.0)
    assert meter.reading.source == "nvml-counter"


def test_power_is_integrated_by_a_thread_in_real_time():
    """Against the trapezoid rule over the very samples the meter took: nothing depends on how busy this machine is."""
    samples: list[tuple[float, float]] = []

    class Nvml(FakeNVML):
        def nvmlDeviceGetFieldValues(self, handle, fields):
            now = time.perf_counter()
            self.board.watts = 100.0 + 400.0 * (now % 0.2)
            samples.append((now, self.board.watts))
            return super().nvmlDeviceGetFieldValues(handle, fields)

    board = Board()
    nvml = Nvml(board)
    nvml.fails["nvmlDeviceGetTotalEnergyConsumption"] = 3
    machine = make_machine(board, nvml=nvml, clock=time.perf_counter, sleep=time.sleep)
    meter = EnergyMeter("cuda", machine=machine)
    assert meter.source == "nvml-power-integral"
    samples.clear()
    with meter:
        time.sleep(0.5)
    expected = sum(0.5 * (a[1] + b[1]) * (b[0] - a[0]) for a, b in itertools.pairwise(samples))
    assert meter.reading.joules == pytest.approx(expected, rel=0.01)
    assert len(samples) >= 5
    taken = len(samples)
    time.sleep(0.06)
    assert len(samples) == taken  # the thread has ended with the window
