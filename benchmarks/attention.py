"""The distillation losses on feature maps, forward and backward: `python -m benchmarks.attention [--quick]`.

Ours against the same formulas in eager torch (each step kept by autograd, as published code writes them) and against
torch.compile of these, side by side; losses and gradients are compared before anything is timed. Maps are those of the
taps of WRN-40-2 -> WRN-16-2 (batch 64, 32 pixels) and ResNet-34 -> ResNet-18 (batch 32, 224 pixels), post-ReLU.

`share` is the least traffic (teacher and student read once, student read and its gradient written once more) over time,
as a share of the bandwidth that reading and adding arrays of this size reach on the same threads in the same run. On a
GPU (`--device cuda`) all are timed as queues of calls between two events of the device, so that Python is not timed.
Freed memory stays with the process (`keep_freed_memory`), as in `sparsekd run`: otherwise glibc returns gradients to
the system and faults them in again, now for one contestant and now for another.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.lib.timing import machine, write_json
from sparsekd import timing
from sparsekd.losses import SAD, attention_transfer_loss, kd_loss
from sparsekd.ops.attention import layer_stats, match_maps
from sparsekd.runs.memory import keep_freed_memory

Taps = Sequence[tuple[int, int, int]]  # (channels, side, how many)


@dataclass(frozen=True)
class Pair:
    name: str
    batch: int
    teacher: Taps
    student: Taps


PAIRS = (
    Pair("wrn", 64, ((32, 32, 6), (64, 16, 6), (128, 8, 6)), ((32, 32, 2), (64, 16, 2), (128, 8, 2))),
    Pair(
        "resnet",
        32,
        ((64, 56, 3), (128, 28, 4), (256, 14, 6), (512, 7, 3)),
        ((64, 56, 2), (128, 28, 2), (256, 14, 2), (512, 7, 2)),
    ),
)
QUICK = Pair("quick", 4, ((16, 8, 2), (32, 4, 2)), ((16, 8, 1), (32, 4, 1)))


def maps_of(taps: Taps, batch: int, last: bool, dtype: torch.dtype, device: str, grad: bool) -> list[Tensor]:
    layout = torch.channels_last if last else torch.contiguous_format
    shapes = [(batch, c, side, side) for c, side, count in taps for _ in range(count)]
    maps = [torch.randn(s, device=device).relu().to(dtype).contiguous(memory_format=layout) for s in shapes]
    return [m.requires_grad_(grad) for m in maps]


def eager_energy(features: Sequence[Tensor]) -> list[Tensor]:
    return [f.float().square().mean(1) for f in features]


def eager_means(features: Sequence[Tensor]) -> list[Tensor]:
    return [f.float().mean((2, 3)) for f in features]


def eager_match(attention: Tensor, teacher: Sequence[Tensor], student: Sequence[Tensor]) -> Tensor:
    """AFD's distance: student maps pooled once for each distinct size, differences by broadcasting."""
    total = attention.new_zeros(())
    pooled: dict[tuple[int, int], Tensor] = {}
    for t, wanted in enumerate(teacher):
        size = (wanted.shape[1], wanted.shape[2])
        if size not in pooled:
            pooled[size] = torch.stack(
                [F.normalize(F.adaptive_avg_pool2d(m, size).flatten(1), dim=1) for m in student], 1
            )
        difference = pooled[size] - F.normalize(wanted.flatten(1), dim=1)[:, None]
        total = total + (attention[:, t] * difference.square().mean(2)).sum(1).mean()
    return total


class EagerAttention(nn.Module):
    """AFD's attention as its published code computes it: a Linear and a batch norm a layer. Starts as `sad` does."""

    def __init__(self, sad: SAD) -> None:
        super().__init__()
        self.dim = sad.dim
        self.queries, self.keys = _apart(sad.queries), _apart(sad.keys)
        self.bilinear = copy.deepcopy(sad.bilinear)
        self.teacher_position, self.student_position = map(copy.deepcopy, (sad.teacher_position, sad.student_position))

    def forward(self, teacher: Sequence[Tensor], student: Sequence[Tensor]) -> Tensor:
        query = torch.stack([layer(means) for layer, means in zip(self.queries, teacher, strict=True)], 1)
        key = torch.stack([F.relu(layer(means)) for layer, means in zip(self.keys, student, strict=True)], 1)
        bilinear = self.bilinear(key.flatten(0, 1)).view(*key.shape[:2], *query.shape[1:])
        logits = torch.einsum("bstq,btq->bts", bilinear, query) + self.teacher_position @ self.student_position.T
        return torch.softmax(logits / self.dim**0.5, 2)


def _apart(together: Any) -> nn.ModuleList:
    """The layers of one side of a SAD, each as modules of its own."""
    layers = nn.ModuleList()
    for weight, bias in zip((w for run in together.weights for w in run), together.bias, strict=True):
        linear = nn.Linear(weight.shape[0], weight.shape[1], device=weight.device)
        linear.weight.data, linear.bias.data = weight.detach().T.contiguous(), bias.detach()[0].clone()
        layers.append(nn.Sequential(linear, nn.BatchNorm1d(weight.shape[1], device=weight.device)))
    return layers


class Losses:
    """Three losses of one pair of networks, each as (ours, eager), scalars of the same tensors."""

    def __init__(self, pair: Pair, last: bool, dtype: torch.dtype, device: str) -> None:
        torch.manual_seed(0)
        self.teacher = maps_of(pair.teacher, pair.batch, last, dtype, device, grad=False)
        self.student = maps_of(pair.student, pair.batch, last, dtype, device, grad=True)
        sizes = [[(f.shape[2], f.shape[3]) for f in side] for side in (self.teacher, self.student)]
        shape = (pair.batch, len(self.teacher), len(self.student))
        self.attention = torch.rand(shape, device=device).softmax(2)
        self.sizes_t, self.sizes_s = sizes
        self.sad = SAD.from_features(self.teacher, self.student)
        self.attend = EagerAttention(self.sad)
        # For attention transfer, a teacher layer of the student's size.
        self.chosen = [next(t for t in self.teacher if t.shape[2:] == s.shape[2:]) for s in self.student]

    def maps(self) -> Tensor:
        """All that touches feature maps in SAD: means, energy, matching under given attention."""
        means_t, energy_t = layer_stats(self.teacher)
        means_s, energy_s = layer_stats(self.student)
        used = means_t.sum() + means_s.square().sum()
        return used + match_maps(self.attention, energy_t, energy_s, self.sizes_t, self.sizes_s)

    def maps_eager(self) -> Tensor:
        used = sum(m.sum() for m in eager_means(self.teacher)) + sum(
            m.square().sum() for m in eager_means(self.student)
        )
        return used + eager_match(self.attention, eager_energy(self.teacher), eager_energy(self.student))

    def sad_whole(self) -> Tensor:
        return self.sad(self.teacher, self.student)

    def sad_whole_eager(self) -> Tensor:
        attention = self.attend(eager_means(self.teacher), eager_means(self.student))
        return eager_match(attention, eager_energy(self.teacher), eager_energy(self.student))

    def at(self) -> Tensor:
        return attention_transfer_loss(self.student, self.chosen)

    def at_eager(self) -> Tensor:
        pairs = zip(eager_energy(self.student), eager_energy(self.chosen), strict=True)
        return sum(F.mse_loss(F.normalize(s.flatten(1)), F.normalize(t.flatten(1))) for s, t in pairs)  # type: ignore[return-value]

    def bytes(self, teacher: Sequence[Tensor]) -> int:
        """The least that must move."""
        size = [sum(m.numel() * m.element_size() for m in side) for side in (teacher, self.student)]
        return size[0] + 3 * size[1]


def gradients(
    loss: Callable[[], Tensor], wanted: Sequence[Tensor], scale: float = 1.0
) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: torch.autograd.grad(scale * loss(), wanted)


def check(name: str, losses: Sequence[Callable[[], Tensor]], wanted: Sequence[Tensor]) -> None:
    # As a GradScaler: the gradients of a mean are so small that float16 would round them to multiples of 6e-8.
    scale = 2.0**16 if any(x.dtype == torch.float16 for x in wanted) else 1.0
    first, *others = [(loss().detach(), gradients(loss, wanted, scale)()) for loss in losses]
    for value, grads in others:
        for got, want in [(value, first[0]), *zip(grads, first[1], strict=True)]:
            limit = 1e-3 if got.dtype == torch.float32 else 2e-2
            difference = (got.float() - want.float()).abs().max().item()
            if not difference <= limit * max(want.abs().max().item(), 1e-12):
                raise RuntimeError(f"benchmarks.attention: {name}: results differ by {difference:.2g}")


def bandwidth(seconds: float, device: str) -> dict[str, float]:
    """GB/s of reading an array (a sum) and of c = a + s b (two reads, one write), 128 MB each."""
    a, b, c = (torch.ones(32 << 20, device=device) for _ in range(3))
    calls: dict[str, Callable[[], Tensor]] = {"read": a.sum, "triad": lambda: torch.add(a, b, alpha=2, out=c)}
    taken = timing.samples(calls, seconds, rounds=15, device=torch.device(device))
    moved = {"read": a.numel() * 4, "triad": 3 * a.numel() * 4}
    return {name: moved[name] / statistics.median(samples) / 1e9 for name, samples in taken.items()}


def measure(
    pair: Pair, last: bool, dtype: torch.dtype, device: str, compiled: bool, seconds: float
) -> list[dict[str, Any]]:
    case = Losses(pair, last, dtype, device)
    cases = {
        "maps": (case.maps, case.maps_eager, case.teacher),
        "attention transfer": (case.at, case.at_eager, case.chosen),
        "sad": (case.sad_whole, case.sad_whole_eager, case.teacher),
    }
    rows = []
    for name, (ours, eager, teacher) in cases.items():
        if compiled:  # or dynamo, which has seen other shapes of the same function, would compile for any shape
            torch.compiler.reset()
        calls = {"ours": ours, "eager": eager, **({"compiled": torch.compile(eager)} if compiled else {})}
        label = f"{pair.name} {name} {'nhwc' if last else 'nchw'} {str(dtype).removeprefix('torch.')}"
        check(label, list(calls.values()), case.student)
        rates = bandwidth(seconds, device)
        steps = {}
        for who, call in calls.items():
            trained = (case.sad if who == "ours" else case.attend).parameters() if name == "sad" else ()
            steps[who] = gradients(call, [*case.student, *trained])
        taken = timing.samples(steps, seconds * len(steps), rounds=9, device=torch.device(device))
        row: dict[str, Any] = {"case": label, "batch": pair.batch, "bytes": case.bytes(teacher), "bandwidth": rates}
        row |= figures(taken)
        row["share"] = row["bytes"] / row["ours_us"] / 1e3 / rates["triad"]
        rows.append(row)
        print_row(row)
    return rows


def figures(taken: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Median microseconds of each contestant, and of each but the first its time over that one's in the same round."""
    found = {f"{who}_us": statistics.median(samples) * 1e6 for who, samples in taken.items()}
    first, *others = taken
    for who in others:
        ratios = [b / a for a, b in zip(taken[first], taken[who], strict=True)]
        found[f"speedup_{who}"] = statistics.median(ratios)
    return found


def print_row(row: dict[str, Any]) -> None:
    cells = [f"{row['case']:44} {row['ours_us']:9.0f} us"]
    cells += [f"{who} {row[f'{who}_us']:9.0f} us {row[f'speedup_{who}']:5.2f}x" for who in ("eager", "compiled")
              if f"{who}_us" in row]  # fmt: skip
    if "share" in row:
        rates = row["bandwidth"]
        cells.append(f"{row['share']:4.0%} of {rates['triad']:.1f} GB/s (reading {rates['read']:.1f})")
    print(" | ".join(cells), flush=True)


def measure_kd(device: str, compiled: bool, seconds: float) -> dict[str, Any]:
    """Logits of 100 classes at batch 64."""
    student, teacher = torch.randn(2, 64, 100, device=device)
    student.requires_grad_()

    def eager() -> Tensor:
        p, q = F.softmax(teacher / 4, 1), F.log_softmax(student / 4, 1)
        return F.kl_div(q, p, reduction="batchmean") * 16

    calls = {"ours": lambda: kd_loss(student, teacher), "eager": eager}
    calls |= {"compiled": torch.compile(eager)} if compiled else {}
    check("kd", list(calls.values()), [student])
    steps = {who: gradients(call, [student]) for who, call in calls.items()}
    taken = timing.samples(steps, seconds * len(steps), rounds=15, device=torch.device(device))
    row = {"case": "kd 64x100", **figures(taken)}
    print_row(row)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny maps: whether it runs, not how fast")
    parser.add_argument("--pair", choices=[pair.name for pair in PAIRS], help="only this pair of networks")
    parser.add_argument("--batch", type=int, help="of images; default 64 and 32")
    parser.add_argument("--dtype", action="append", help="may be repeated; default float32 and bfloat16")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=0.4, help="of each contestant")
    parser.add_argument("--json", metavar="PATH", help="also write the rows there")
    args = parser.parse_args()
    keep_freed_memory()
    seconds = 0.02 if args.quick else args.seconds
    pairs = (QUICK,) if args.quick else [pair for pair in PAIRS if args.pair in (None, pair.name)]
    pairs = [replace(pair, batch=args.batch or pair.batch) for pair in pairs]
    on = machine() if args.device == "cpu" else {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    print(", ".join(f"{key} {value}" for key, value in on.items()))
    compiled = not (args.no_compile or args.quick)
    rows = [measure_kd(args.device, compiled, seconds)]
    for pair in pairs:
        for dtype in args.dtype or ("float32", "bfloat16"):
            for last in (False, True):
                rows += measure(pair, last, getattr(torch, dtype), args.device, compiled, seconds)
                if args.json:  # each time: compiling takes long, and what is there is worth having
                    write_json(args.json, f"python -m benchmarks.attention {' '.join(sys.argv[1:])}", rows, on)


if __name__ == "__main__":
    main()
