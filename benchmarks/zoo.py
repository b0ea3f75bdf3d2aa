"""Public architectures through the whole of sparsekd: converted, frozen, compared, timed, saved and read back.

    pip install -e '.[bench,zoo]'
    python -m benchmarks.zoo --out benchmarks/results/zoo.jsonl --threads 2
    python -m benchmarks.zoo --out benchmarks/results/zoo.jsonl --network timm/resnet18 --network hf/bert
    python -m benchmarks.zoo --out benchmarks/results/zoo.jsonl --show

Random weights, nothing is downloaded; batch norms get statistics that are not those of a fresh network. Each network
has a process of its own, and OpenVINO another, whose thread pools would stall each other. A row is written as soon as
it is measured, with the machine it was measured on; rows that are there are not measured again. Eager is the dense
network in PyTorch; frozen / eager is the median of rounds in which they take turns.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sparsekd
from benchmarks.lib.models import MobileNetV2, resnet50, wrn_16_2
from benchmarks.lib.timing import machine
from sparsekd import timing
from sparsekd.freeze import outputs

DENSITIES = (1.0, 0.3)
LIMIT = 3e-3  # largest difference from the model, relative to the largest output
Example = dict[str, Tensor] | tuple[Tensor, ...]

# ---- The networks, by where they come from

# fmt: off
TIMM = [
    "resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2", "seresnet50", "ecaresnet26t", "resnetv2_50",
    "regnetx_008", "regnety_008", "mobilenetv2_100", "mobilenetv3_large_100", "mobilenetv3_small_100",
    "mobilenetv4_conv_small", "efficientnet_b0", "efficientnet_lite0", "efficientnetv2_rw_s", "mnasnet_100",
    "mixnet_s", "ghostnet_100", "fbnetc_100", "tinynet_a", "lcnet_050", "hrnet_w18_small", "dla34", "densenet121",
    "inception_v3", "vgg11_bn", "darknet53", "cspresnet50", "repvgg_a0", "convnext_atto", "convnextv2_atto",
    "convmixer_768_32", "poolformer_s12", "vit_tiny_patch16_224", "deit_tiny_patch16_224",
    "swin_tiny_patch4_window7_224", "mobilevit_xxs", "mobilevitv2_050", "levit_128s", "efficientformer_l1",
    "mixer_s32_224", "nfnet_l0", "xcit_nano_12_p16_224", "fastvit_t8", "skresnet18",
]
TORCHVISION = [
    "alexnet", "squeezenet1_1", "googlenet", "shufflenet_v2_x1_0", "mobilenet_v3_small", "efficientnet_b0",
    "regnet_y_400mf", "densenet121", "mnasnet0_5", "swin_t", "vit_b_32", "resnet18",
]
# fmt: on
SEGMENTATION = ("Unet", "UnetPlusPlus", "Linknet", "FPN", "PSPNet", "DeepLabV3", "DeepLabV3Plus", "MAnet", "PAN")
_TEXT = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 512}
TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", _TEXT),
    "roberta": ("Roberta", _TEXT),
    "electra": ("Electra", {**_TEXT, "embedding_size": 64}),
    "albert": ("Albert", {**_TEXT, "embedding_size": 64}),
    "distilbert": ("DistilBert", {"dim": 128, "n_layers": 2, "n_heads": 4, "hidden_dim": 512}),
    "gpt2": ("GPT2", {"n_embd": 128, "n_layer": 2, "n_head": 4}),
    "opt": ("OPT", {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 512}),
    "mpnet": ("MPNet", _TEXT),
}


def _timm(name: str) -> tuple[nn.Module, Example]:
    _import_torchvision()
    import timm

    model = timm.create_model(name, pretrained=False)
    size = model.default_cfg["input_size"]  # type: ignore[index]
    side = size[1] if model.default_cfg.get("fixed_input_size") else min(size[1], 160)  # type: ignore[union-attr]
    return model, (torch.randn(1, 3, side, side),)


def _torchvision(name: str) -> tuple[nn.Module, Example]:
    _import_torchvision()
    import torchvision

    options = {"init_weights": True} if name == "googlenet" else {}
    return torchvision.models.get_model(name, weights=None, **options), (torch.randn(1, 3, 224, 224),)


def _segmentation(name: str) -> tuple[nn.Module, Example]:
    _import_torchvision()
    import segmentation_models_pytorch as smp

    return getattr(smp, name)("resnet18", encoder_weights=None, classes=4), (torch.randn(1, 3, 128, 128),)


def _transformers(name: str) -> tuple[nn.Module, Example]:
    import transformers

    kind, sizes = TRANSFORMERS[name]
    config = getattr(transformers, f"{kind}Config")(vocab_size=1000, **sizes)
    model = getattr(transformers, f"{kind}Model")(config)
    ids = torch.randint(5, 1000, (1, 64))
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _encoder(name: str) -> tuple[nn.Module, Example]:
    layer = nn.TransformerEncoderLayer(128, 4, 512, batch_first=True, activation=name)
    return nn.TransformerEncoder(layer, 2), (torch.randn(1, 64, 128),)


def _import_torchvision() -> None:
    """Also a wheel for another build of torch, whose own operators do not load: no network here calls them, but
    torchvision describes them when it is imported."""
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None or _DEFINED:
        return  # whoever imports it says so
    libraries = list(Path(found.origin).parent.glob("_C*.so"))
    try:
        for library in libraries:
            torch.ops.load_library(library)
    except OSError:
        _DEFINED.append(torch.library.Library("torchvision", "DEF"))
        for name in _OPERATORS:
            _DEFINED[0].define(f"{name}(Tensor x) -> Tensor")


_DEFINED: list[torch.library.Library] = []
_WITH_GRADIENTS = ("roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d")
_OPERATORS = ("nms", "qnms", *_WITH_GRADIENTS, *(f"_{name}_backward" for name in _WITH_GRADIENTS))
_IMAGE, _SMALL = (1, 3, 224, 224), (1, 3, 32, 32)
NETWORKS: dict[str, Callable[[], tuple[nn.Module, Example]]] = {
    "sparsekd/resnet50": lambda: (resnet50(), (torch.randn(_IMAGE),)),
    "sparsekd/wrn_16_2": lambda: (wrn_16_2(), (torch.randn(_SMALL),)),
    "sparsekd/mobilenetv2": lambda: (MobileNetV2(), (torch.randn(_IMAGE),)),
    **{f"torch/encoder_{name}": partial(_encoder, name) for name in ("relu", "gelu")},
    **{f"timm/{name}": partial(_timm, name) for name in TIMM},
    **{f"torchvision/{name}": partial(_torchvision, name) for name in TORCHVISION},
    **{f"smp/{name}": partial(_segmentation, name) for name in SEGMENTATION},
    **{f"hf/{name}": partial(_transformers, name) for name in TRANSFORMERS},
}


def build(name: str) -> tuple[nn.Module, Example]:
    torch.manual_seed(0)
    model, example = NETWORKS[name]()
    for module in model.modules():
        if isinstance(getattr(module, "running_var", None), Tensor):
            module.running_mean.normal_(0, 0.1)  # type: ignore[operator, union-attr]
            module.running_var.uniform_(0.5, 1.5)  # type: ignore[operator, union-attr]
    return model.eval(), example


def call(model: Callable[..., Any], example: Example) -> Any:
    with torch.no_grad():
        return model(**example) if isinstance(example, dict) else model(*example)


# ---- One network


def stages(name: str, seconds: float, layer_ms: float) -> Iterator[dict[str, Any]]:
    """What each stage finds, one after the other; an exception is the stage's that would have come next."""
    model, example = build(name)
    want = call(model, example)
    norms = sum(isinstance(getattr(one, "running_var", None), Tensor) for one in model.modules())
    yield {"stage": "built", "parameters": sum(p.numel() for p in model.parameters()), "norms": norms}
    sparse = sparsekd.sparsify(copy.deepcopy(model))
    layers = [one for one in sparse.modules() if isinstance(one, sparsekd.nn.BlockSparseLayer)]
    parity = outputs.deviation(call(sparse, example), want, 1.0)
    if parity > LIMIT:
        raise RuntimeError(f"the block-sparse network differs by {parity:.2g}")
    yield {"stage": "converted", "converted": len(layers), "parity_sparse": parity}
    for density in DENSITIES:
        pruned = model if density == 1.0 else sparsekd.sparsify(copy.deepcopy(model), density=density)
        for found in _frozen(name, model, pruned, example, seconds, layer_ms):
            yield {key if key == "stage" else f"{key}@{density:g}": value for key, value in found.items()}


def _frozen(
    name: str, model: nn.Module, pruned: nn.Module, example: Example, seconds: float, layer_ms: float
) -> Iterator[dict[str, Any]]:
    frozen = sparsekd.freeze(pruned, example, layer_ms=layer_ms)
    folded = sum(one.geometry.batch_norm or one.geometry.kind == "norm" for one in frozen.plan)
    parity = outputs.deviation(call(frozen, example), call(pruned, example), 1.0)
    yield {"stage": "frozen", "traced": frozen.record["traced"] or "no", "folded": folded, "parity": parity,
           "eager_kept": frozen.plan.eager, "notes": list(frozen.plan.notes)}  # fmt: skip
    if parity > LIMIT:
        raise RuntimeError(f"the frozen network differs by {parity:.2g}")
    calls = {"eager": partial(call, model, example), "frozen": partial(call, frozen, example)}
    taken = timing.samples(calls, seconds)
    ratios = [ours / theirs for ours, theirs in zip(taken["frozen"], taken["eager"], strict=True)]
    us = {f"{which}_us": 1e6 * statistics.median(column) for which, column in taken.items()}
    yield {"stage": "timed", **us, "frozen/eager": statistics.median(ratios)}
    with tempfile.TemporaryDirectory() as folder:
        frozen.save(f"{folder}/frozen")
        again = sparsekd.load_frozen(f"{folder}/frozen", build(name)[0])
        if outputs.deviation(call(again, example), call(frozen, example), 1e-5) > 1.0:
            raise RuntimeError("the network that was read back answers otherwise")
    yield {"stage": "read back"}


def openvino(name: str, seconds: float, threads: int) -> dict[str, Any]:
    import openvino as ov

    model, example = build(name)
    example_input: Any = example if isinstance(example, dict) else example[0]
    network = ov.convert_model(model, example_input=example_input)
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    request = ov.Core().compile_model(network, "CPU", options).create_infer_request()
    given = [x.contiguous().numpy() for x in (example.values() if isinstance(example, dict) else example)]
    taken = timing.medians({"openvino": lambda: request.infer(given)}, seconds)
    return {"openvino_us": 1e6 * taken["openvino"]}


def measure(name: str, seconds: float, layer_ms: float, threads: int) -> dict[str, Any]:
    """The row of one network; "failed" says in which stage it stopped, and why."""
    torch.set_num_threads(threads)
    row: dict[str, Any] = {"network": name, "failed": None, "machine": machine(), "stages": []}
    try:
        for found in stages(name, seconds, layer_ms):
            row["stages"].append(found.pop("stage"))
            row |= found
    except Exception as error:
        row["failed"] = f"{type(error).__name__}: {error}"[:500]
    return row


# ---- All of them


def rows_in(path: Path) -> dict[str, dict[str, Any]]:
    """By network; of two the later one counts."""
    if not path.exists():
        return {}
    return {row["network"]: row for row in map(json.loads, path.read_text().splitlines())}


def table(rows: dict[str, dict[str, Any]]) -> str:
    dense, sparse = (f"@{density:g}" for density in DENSITIES)
    lines = ["| network | layers | traced | norms folded | dense / eager | .3 / eager | .3 / OpenVINO | read back |"]
    lines.append("|---" * 8 + "|")
    for name, row in sorted(rows.items()):
        if row["failed"]:
            lines.append(f"| {name} | {row.get('converted', '-')} | {row['failed'][:120]} | | | | | |")
            continue
        norms = f"{row[f'folded{sparse}']} of {row['norms']}"
        against = row["frozen_us" + sparse] / row["openvino_us"] if row.get("openvino_us") else None
        numbers = (row["frozen/eager" + dense], row["frozen/eager" + sparse], against)
        shown = " | ".join("-" if x is None else f"{x:.2f}" for x in numbers)
        traced = row[f"traced{sparse}"] + (", eager kept" if row[f"eager_kept{sparse}"] else "")
        lines.append(f"| {name} | {row['converted']} | {traced} | {norms} | {shown} | yes |")
    good = [row for row in rows.values() if not row["failed"]]
    if good:
        norms, folded = sum(row["norms"] for row in good), sum(row["folded" + sparse] for row in good)
        median = statistics.median(row["frozen/eager" + sparse] for row in good)
        slower = [row["network"] for row in good if max(row["frozen/eager" + one] for one in (dense, sparse)) > 1.05]
        lines.append(
            f"\n{len(good)} of {len(rows)} pass every stage; {folded} of {norms} norms folded; median frozen / eager "
            f"at density .3: {median:.2f}; slower than eager by more than 5 %: {', '.join(slower) or 'none'}."
        )
    return "\n".join(lines)


def _in_a_process(arguments: list[str], minutes: float) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.zoo", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60 * minutes)
    except subprocess.TimeoutExpired:
        return {"failed": f"took more than {minutes:g} minutes"}
    if done.returncode:
        return {"failed": f"exit status {done.returncode}: {done.stderr.strip()[-300:]}"}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("zoo.jsonl"), help="rows are appended here")
    parser.add_argument("--network", action="append", help="one of those that --list names; default: all")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=2.0, help="to time a network for")
    parser.add_argument("--layer-ms", type=float, default=60.0, help="of freeze")
    parser.add_argument("--minutes", type=float, default=20.0, help="that one network may take")
    parser.add_argument("--again", action="store_true", help="measure also what is in the file")
    parser.add_argument("--list", action="store_true", help="name the networks")
    parser.add_argument("--show", action="store_true", help="print the table of what was measured")
    parser.add_argument("--one", choices=("ours", "openvino"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = options.network or list(NETWORKS)
    unknown = [name for name in names if name not in NETWORKS]
    if unknown:
        parser.error(f"unknown network {', '.join(unknown)}; --list names them")
    if options.one == "ours":
        print(json.dumps(measure(names[0], options.seconds, options.layer_ms, options.threads)))
    elif options.one == "openvino":
        print(json.dumps(openvino(names[0], options.seconds, options.threads)))
    elif options.list:
        print("\n".join(names))
    elif options.show:
        print(table(rows_in(options.out)))
    else:
        _measure_all(names, options)
    return 0


def _measure_all(names: list[str], options: argparse.Namespace) -> None:
    there = {} if options.again else rows_in(options.out)
    given = [f"--threads={options.threads}", f"--seconds={options.seconds}", f"--layer-ms={options.layer_ms}"]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names, 1):
        if name in there:
            continue
        row = {
            "network": name,
            "failed": None,
            **_in_a_process([f"--network={name}", "--one=ours", *given], options.minutes),
        }
        theirs = _in_a_process([f"--network={name}", "--one=openvino", *given], options.minutes)
        row |= {"openvino_us": theirs.get("openvino_us"), "openvino_failed": theirs.get("failed")}
        with options.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{number}/{len(names)} {name}: {row['failed'] or 'all stages'}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
