"""The gate: its arithmetic, what it stores, and a run of two tiny layers."""

import json
import subprocess

import pytest
import torch

from benchmarks import gate
from benchmarks.gate import Figure, judge
from benchmarks.lib import shapes, timing
from benchmarks.suites import layers


@pytest.mark.parametrize(
    ("now", "status"),
    [(2.0, "ok"), (1.61, "ok"), (1.59, "slower"), (2.39, "ok"), (2.41, "faster")],
)
def test_a_case_is_slower_below_the_tolerance_only(now, status):
    verdict = judge("a", Figure(now), Figure(2.0), tolerance=0.2)
    assert (verdict.status, verdict.floor) == (status, pytest.approx(1.6))


def test_a_kernel_that_got_a_third_slower_is_caught():
    assert judge("a", Figure(2.0 / 1.5), Figure(2.0)).status == "slower"
    assert judge("a", Figure(2.0 * 0.87), Figure(2.0)).status == "ok"  # the largest movement seen without a cause


def test_much_noise_decides_nothing_but_does_not_hide_a_good_figure():
    noise = gate.NOISE_LIMIT + 0.05
    assert judge("a", Figure(0.5, noise), Figure(2.0), 0.2).status == "noisy"
    assert judge("a", Figure(0.5), Figure(2.0, noise), 0.2).status == "noisy"
    assert judge("a", Figure(1.9, noise), Figure(2.0), 0.2).status == "ok"


def test_a_case_that_was_not_measured_is_missing():
    assert judge("a", None, Figure(2.0)).status == "missing"
    assert [v.status for v in gate.judge_all({}, {"a": Figure(2.0)}, 0.2)] == ["missing"]


def judged(*attempts):
    """The one verdict on a case stored at 2.0 whose attempts give these figures, in order."""
    left = [each if isinstance(each, Figure) else Figure(each) for each in attempts]
    (verdict,) = gate.judge_all({"a": lambda: left.pop(0)}, {"a": Figure(2.0)}, 0.2)
    return verdict.status, verdict.now


def test_a_disturbed_attempt_is_retried():
    assert judged(0.5, 0.9, 1.9) == ("ok", Figure(1.9))


def test_what_is_slower_in_every_attempt_is_slower_with_its_best_figure():
    assert judged(1.1, 1.3, 1.2, 1.25) == ("slower", Figure(1.3))


def test_a_quiet_slow_attempt_outweighs_noisy_ones():
    noisy = Figure(1.4, gate.NOISE_LIMIT + 0.05)
    assert judged(noisy, 1.2, noisy, noisy) == ("slower", Figure(1.2))


def test_attempts_are_spread_over_the_run():
    order, figures = [], {"a": [1.0, 2.0], "b": [2.0]}

    def measure(name):
        order.append(name)
        return Figure(figures[name].pop(0))

    stored = {"a": Figure(2.0), "b": Figure(2.0)}
    found = list(gate.judge_all({"a": lambda: measure("a"), "b": lambda: measure("b")}, stored, 0.2))
    assert order == ["a", "b", "a"] and [v.status for v in found] == ["ok", "ok"]


def test_exit_status():
    ok, slower = judge("a", Figure(2.0), Figure(2.0)), judge("a", Figure(1.0), Figure(2.0))
    missing = judge("a", None, Figure(2.0))
    assert [gate.exit_status(v) for v in ([ok], [ok, slower], [ok, missing], [missing, slower], [])] == [0, 1, 2, 1, 2]


def test_noise_is_the_distance_of_two_equal_columns_and_speedup_the_median_of_neighbours():
    ours, dense = [1.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0], [3.0, 6.0, 3.0, 3.0, 3.0, 3.0, 3.0]
    assert gate.figure_of(ours, dense, dense) == Figure(3.0, 0.0)  # the machine that slowed both down does not count
    assert gate.figure_of(ours, dense, [d * 1.25 for d in dense]).noise == pytest.approx(0.2)


def test_cases_on_which_processes_disagree_are_left_out():
    runs = [{"a": Figure(2.0, 0.01), "b": Figure(2.6)}, {"a": Figure(2.1, 0.02), "b": Figure(3.9)}]
    kept, left_out = gate.agreed([*runs, {"a": Figure(1.9, 0.5), "b": Figure(3.8)}])
    assert kept == {"a": Figure(2.0, 0.05)}  # one run's noise of 0.5 is not the median
    assert left_out == {"b": pytest.approx(1 - 2.6 / 3.8, abs=1e-4)}


def store(path, cases, **here):
    path.write_text(json.dumps({"machines": [{"machine": {**timing.machine(), **here}, "cases": cases}]}))


def test_the_gate_measures_and_judges(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        gate,
        "LAYERS",
        [layers.at("tiny", 2, shapes.Conv("any", 16, 4, 16, 3)), layers.at("flat", 4, shapes.Linear("any", 32, 32))],
    )
    monkeypatch.setattr(gate, "REPEATS", 7)
    threads = torch.get_num_threads()
    path = tmp_path / "gate.json"
    store(path, {name: {"speedup": 1e-3} for name in gate.gate_cases()})
    assert gate.main([str(path), "--seconds", "0.01"]) == 0
    store(path, {"grad-input-tiny": {"speedup": 1e6}})
    assert gate.main([str(path), "--seconds", "0.01"]) in (1, 2)  # 2 where the machine is too noisy to tell
    store(path, {"forward-gone": {"speedup": 2.0}})
    assert gate.main([str(path), "--seconds", "0.01"]) == 2
    assert "forward-gone" in capsys.readouterr().out
    assert torch.get_num_threads() == threads


def test_figures_of_this_processor_are_taken_else_the_lowest_with_more_tolerance(tmp_path):
    here = {"cpu": "b", "isa": "avx512_bf16", "torch": "2"}
    entries = [
        {"machine": {"cpu": cpu, "isa": isa, "torch": torch}, "cases": {"a": {"speedup": speedup}}}
        for cpu, isa, torch, speedup in [
            ("a", "avx512", "2", 1.0), ("b", "avx512", "2", 3.0), ("b", "avx512", "1", 2.0), ("b", "avx2", "2", 4.0),
        ]
    ]  # fmt: skip
    path = tmp_path / "gate.json"
    path.write_text(json.dumps({"machines": entries}))
    assert gate.stored_for(path, here) == ({"a": Figure(3.0)}, gate.TOLERANCE)
    assert gate.stored_for(path, {**here, "cpu": "c"}) == ({"a": Figure(1.0)}, gate.TOLERANCE_ELSEWHERE)


def test_figures_of_another_processor_are_those_of_the_same_vectors(tmp_path):
    path = tmp_path / "gate.json"
    kinds = [("avx512", 256, 2.0), ("avx512", 512, 1.2), ("avx2", 256, 1.0), ("avx512_bf16", 512, 1.4)]
    entries = [
        {"machine": {"cpu": "a", "isa": isa, "torch": "2", "vector_bits": bits}, "cases": {"a": {"speedup": speedup}}}
        for isa, bits, speedup in kinds
    ]
    path.write_text(json.dumps({"machines": entries}))
    for isa, bits, speedup in [("avx512_vnni", 512, 1.2), ("avx512", 256, 2.0), ("avx2", 256, 1.0), ("neon", 128, 1.0)]:
        here = {"cpu": "b", "isa": isa, "torch": "2", "vector_bits": bits}
        assert gate.stored_for(path, here) == ({"a": Figure(speedup)}, gate.TOLERANCE_ELSEWHERE)


@pytest.mark.parametrize(("rates", "bits"), [({"avx2": 100, "avx512": 190}, 512), ({"avx2": 100, "avx512": 104}, 256)])
def test_the_width_of_avx512_is_measured(monkeypatch, rates, bits):
    used = ["avx512_vnni"]
    monkeypatch.setattr(gate._C, "isa", lambda: used[-1])
    monkeypatch.setattr(gate._C, "use_isa", used.append)
    monkeypatch.setattr(gate._C, "peak_gflops", lambda threads, seconds: rates[used[-1]])
    assert gate.vector_bits() == bits and used[-1] == "avx512_vnni"


def test_update_replaces_the_figures_of_this_processor_alone(tmp_path, monkeypatch):
    path = tmp_path / "gate.json"
    store(path, {"a": {"speedup": 9.0}}, cpu="another")
    measured = json.dumps({"a": {"speedup": 2.0, "noise": 0.01}})
    monkeypatch.setattr(gate.subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 0, measured))
    for _ in range(2):
        assert gate.main([str(path), "--update"]) == 0
    machines = json.loads(path.read_text())["machines"]
    assert [(entry["machine"]["cpu"], entry["cases"]["a"]["speedup"]) for entry in machines] == [
        ("another", 9.0), (timing.machine()["cpu"], 2.0),
    ]  # fmt: skip


def test_the_gate_needs_something_stored(tmp_path, capsys):
    assert gate.main([str(tmp_path / "none.json")]) == 2
    assert "--update writes it" in capsys.readouterr().err
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="not a stored gate"):
        gate.stored_for(tmp_path / "other.json", {})


def test_a_stored_gate_has_every_case_or_says_why_not():
    for path in gate.RESULTS.glob("gate.json"):
        for entry in json.loads(path.read_text())["machines"]:
            assert set(entry["cases"]) | set(entry["left_out"]) == set(gate.gate_cases()), path
            assert all(case["speedup"] > 0 and case["noise"] <= gate.NOISE_LIMIT for case in entry["cases"].values())
