"""Two ranks train one network, write it once, begin afresh and stop together."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparsekd import checkpoint
from sparsekd.convert import SPARSE_TYPES

from .made_up_images import Tiny

TWO_RANKS = """
import importlib, sys
sys.path.insert(0, sys.argv[3])
import pytest
from tests.runs import made_up_images as here
from sparsekd import distributed, runs
run_module = importlib.import_module("sparsekd.runs.run")
here.shrink(pytest.MonkeyPatch())
fit = run_module.jobs.fit
def checked(model, *args, **options):
    epochs = fit(model, *args, **options)
    distributed.check_same_masks(model)
    state = [float(p.double().sum()) for p in model.state_dict().values()]
    distributed.check_same("values", model, state)
    return epochs
run_module.jobs.fit = checked
results, out = runs.run(here.config(sys.argv[1], sys.argv[2], methods=("lth-sad", "random")), lambda line: None)
print(len(results["rows"]))
"""


def on_two_ranks(script: str, folder, tmp_path) -> subprocess.CompletedProcess:
    (tmp_path / "two.py").write_text(script)
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*command, str(tmp_path / "two.py"), str(folder), str(tmp_path / "out"), str(root)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_two_ranks_train_one_network(folder, tmp_path):
    done = on_two_ranks(TWO_RANKS, folder, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.replace("\n", "") == "77"  # the two may print at once
    rows = json.loads((tmp_path / "out/seed0/lth-sad/rows.json").read_text())
    saved = checkpoint.load(Tiny(), tmp_path / "out/seed0/lth-sad/model-0.3.safetensors")
    kept = [layer.num_kept for layer in saved.modules() if isinstance(layer, SPARSE_TYPES)]
    assert kept and rows[1]["metrics"]["weights_kept"] == pytest.approx(0.3, abs=0.02)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_ranks_that_train_apart_are_found_after_an_epoch(folder, tmp_path):
    apart = "from sparsekd import distributed; distributed.average_gradients = lambda parameters: None"
    done = on_two_ranks(f"{apart}\n{TWO_RANKS}", folder, tmp_path)
    assert done.returncode == 1 and "rank 1 holds other parameters than rank 0" in done.stderr


RANKINGS = """
import importlib, sys
from sparsekd import distributed, runs
rankings = importlib.import_module("sparsekd.runs.plans.rankings")
rankings.QUICK, rankings.QUICK_RECIPE = {"most_items": 40}, {"epochs": 3, "batch_size": 512}
method = importlib.import_module("sparsekd.methods.sparserec")
exchange, exchanges = method.SparseRec._exchange, []
def watched(self, moves):
    exchange(self, moves)
    distributed.check_same_masks(self.student)
    exchanges.append(moves)
method.SparseRec._exchange = watched
config = runs.RunConfig(
    "sparserec", quick=True, methods=("sparserec", "sparserec-adam"), densities=(0.1,), out=sys.argv[2], measure=False
)
results, out = runs.run(config, lambda line: None)
assert len(exchanges) > 5, exchanges
print(len(results["rows"]))
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_two_ranks_exchange_the_same_entries_of_tables(folder, tmp_path):
    done = on_two_ranks(RANKINGS, folder, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.replace("\n", "") == "33"
    for name in ("sparserec", "sparserec-adam"):
        (row,) = json.loads((tmp_path / f"out/seed0/{name}-0.1/rows.json").read_text())
        assert row["metrics"]["weights_kept"] == pytest.approx(0.1, abs=1e-3)


STOPPED_RANKS = """
import datetime, importlib, sys, time
sys.path.insert(0, sys.argv[3])
import pytest, torch
from tests.runs import made_up_images as here
from sparsekd import cli, runs
run_module = importlib.import_module("sparsekd.runs.run")
here.shrink(pytest.MonkeyPatch())
torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
def run(**fields):
    return runs.run(here.config(sys.argv[1], sys.argv[2], methods=(), **fields), lambda line: None)[0]
run()
clear = run_module.clear
def slowly(out):
    time.sleep(3)
    clear(out)
run_module.clear = slowly
trained = []
fit = run_module.jobs.fit
run_module.jobs.fit = lambda *args, **options: trained.append(1) or fit(*args, **options)
run(fresh=True)
assert len(trained) == 3, "rank 1 has read what rank 0 was about to clear"
try:
    run(remeasure=True, stop_after=1e-9)
    raise AssertionError("not stopped")
except runs.OutOfTime:
    torch.distributed.barrier()  # both are here
arguments = ["run", "cifar100", "--data", sys.argv[1], "--out", sys.argv[2] + "2", "--quick", "--method", "kd"]
assert cli.main([*arguments, "--device", "cpu", "--stop-after", "1e-9"]) == cli.TRY_AGAIN
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_ranks_begin_afresh_and_stop_together(folder, tmp_path):
    done = on_two_ranks(STOPPED_RANKS, folder, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count("time is up") == 1  # rank 0 says so
