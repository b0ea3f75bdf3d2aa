"""Networks run on threads of their own: as many as torch is set to, from any thread of the caller, and after fork."""

import subprocess
import sys

import pytest

from sparsekd import backends

pytestmark = pytest.mark.skipif(backends.cpu.native is None, reason="no compiled kernels")

NETWORK = """
import os, signal, threading, torch, sparsekd
from torch import nn
torch.manual_seed(0)
torch.set_num_threads({threads})
layers = [layer for _ in range(3) for layer in (nn.Conv2d(64, 64, 3, padding=1), nn.ReLU())]
x = torch.randn(1, 64, 16, 16)
frozen = sparsekd.freeze(sparsekd.sparsify(nn.Sequential(*layers), density=0.5).eval(), x, layer_ms=1.0, min_gain=0.0)
assert {{layer.chosen for layer in frozen.plan}} == {{"sparse"}}, frozen.plan
want = frozen(x)
def tasks():
    return len(os.listdir("/proc/self/task"))
"""


def python(code: str, threads: int) -> None:
    """Runs the code in a process of its own, in which no other test has started threads."""
    command = [sys.executable, "-c", NETWORK.format(threads=threads) + code]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_one_thread_starts_none_and_more_start_so_many_once():
    python(
        """
before = tasks()
assert all(torch.equal(frozen(x), want) for _ in range(20)) and tasks() == before
torch.set_num_threads(3)
assert torch.equal(frozen(x), want)
assert before < tasks() <= before + 4, tasks()  # ours, and OpenMP's
started = tasks()
assert all(torch.equal(frozen(x), want) for _ in range(200)) and tasks() == started
""",
        threads=1,
    )


def test_a_child_of_fork_computes_the_same():
    """OpenMP's threads are lost in it as well, and torch itself would wait for them for ever."""
    python(
        """
child = os.fork()
if child == 0:
    signal.alarm(120)
    os._exit(0 if all(torch.equal(frozen(x), want) for _ in range(20)) else 1)
assert os.waitpid(child, 0)[1] == 0
assert torch.equal(frozen(x), want)
""",
        threads=2,
    )


def test_many_callers_at_once():
    python(
        """
wrong = []
def call(threads):
    torch.set_num_threads(threads)
    wrong.extend(1 for _ in range(50) if not torch.equal(frozen(x), want))
callers = [threading.Thread(target=call, args=(1 + i % 3,)) for i in range(6)]
for caller in callers:
    caller.start()
for caller in callers:
    caller.join()
assert not wrong
""",
        threads=2,
    )
