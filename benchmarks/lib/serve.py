"""One run time in a process of its own: when it has started, how long a call takes, and what memory it holds.

    python -m benchmarks.lib.serve "ONNX Runtime" network.onnx inputs.npz output.npy THREADS SECONDS

prints one line of JSON. `start` imports what the run time needs and nothing else, so that the seconds and the bytes are
its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

WARM_UP = 0.3  # seconds
Call = Callable[[list[Any]], Any]


def sparsekd_runtime(path: str, names: list[str], shapes: list[Any], threads: int) -> Call:
    from sparsekd.runtime import Session

    session = Session(path, threads=threads)
    return lambda x: session(*x)


def frozen_model(path: str, names: list[str], shapes: list[Any], threads: int) -> Call:
    import torch

    from benchmarks.lib.models import NETWORKS
    from sparsekd import load_frozen

    torch.set_num_threads(threads)
    frozen = load_frozen(path, NETWORKS[Path(path).parent.name][0]())
    return lambda x: frozen(*map(torch.from_numpy, x)).numpy()


def onnx_runtime(path: str, names: list[str], shapes: list[Any], threads: int) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, dict(zip(names, x, strict=True)))[0]


def openvino(path: str, names: list[str], shapes: list[Any], threads: int) -> Call:
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    model.reshape(dict(zip(names, shapes, strict=True)))
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    return lambda x: request.infer(dict(zip(names, x, strict=True)))[0]


def mnn(path: str, names: list[str], shapes: list[Any], threads: int) -> Call:
    import MNN
    import numpy as np

    manager = MNN.nn.create_runtime_manager(({"backend": "CPU", "precision": "high", "numThread": threads},))
    module = MNN.nn.load_module_from_file(path, names, ["output"], runtime_manager=manager)

    def call(x: list[Any]) -> Any:
        given = [MNN.expr.const(one, list(one.shape), MNN.expr.NCHW) for one in x]
        result = module.forward(given)
        result = result[0] if isinstance(result, (list, tuple)) else result
        return np.array(MNN.expr.convert(result, MNN.expr.NCHW).read())

    return call


RUNTIMES: dict[str, tuple[Callable[..., Call], str]] = {  # name -> (how it starts, its file)
    "sparsekd.runtime": (sparsekd_runtime, "network.skd"),
    "FrozenModel": (frozen_model, "network.frozen"),
    "ONNX Runtime": (onnx_runtime, "network.onnx"),
    "OpenVINO": (openvino, "network.onnx"),
    "MNN": (mnn, "network.mnn"),
    "MNN, sparse": (mnn, "network-sparse.mnn"),
}


def resident_mb(line: str) -> float:
    """Of this process: VmRSS is what it holds now, VmHWM what it held at most."""
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(one for one in status if one.startswith(line)).split()[1]) / 1024


def main() -> None:
    began = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runtime", choices=RUNTIMES)
    parser.add_argument("path", help="of the network, as this run time wants it")
    parser.add_argument("inputs", help=".npz, an array for each input under its name")
    parser.add_argument("output", help=".npy to write the first answer to")
    parser.add_argument("threads", type=int)
    parser.add_argument("seconds", type=float, help="to take times for")
    options = parser.parse_args()
    import numpy as np

    arrays = dict(np.load(options.inputs))
    x = list(arrays.values())
    numpy_done, numpy_mb = time.perf_counter(), resident_mb("VmRSS")
    call = RUNTIMES[options.runtime][0](options.path, list(arrays), [one.shape for one in x], options.threads)
    ready = time.perf_counter()
    np.save(options.output, call(x))
    first = time.perf_counter()
    once = partial(call, x)
    samples: list[float] = []
    while (start := time.perf_counter()) < first + WARM_UP + options.seconds or len(samples) < 3:
        once()
        if start > first + WARM_UP:
            samples.append(time.perf_counter() - start)
    row = {
        "start_s": ready - numpy_done,  # imports, and the file read
        "numpy_s": numpy_done - began,
        "first_call_s": first - ready,
        "us": 1e6 * statistics.median(samples),
        "numpy_mb": numpy_mb,
        "resident_mb": resident_mb("VmRSS"),
        "peak_mb": resident_mb("VmHWM"),
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()
