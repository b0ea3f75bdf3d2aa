#!/usr/bin/env bash
# The day there is a GPU: build offline, prove, measure, tabulate. Each command has 9 minutes; name the stages to run.
#
#   benchmarks/gpu/acceptance.sh [--rehearse] [--links] [--out DIR] [stage ...]
#
#   build      pip install -e . without network; with --links, or where that fails, a tree of links to the sources
#   tests      the tests of the kernels, Triton and CUDA C++, on this GPU, compiled for it
#   layers     each layer, direction and density against cuDNN, batch 32
#   layers256  the same with batch 256
#   layers1    the same with batch 1, forward only
#   network    whole-network inference in CUDA graphs, as trained and frozen
#   training   a training step in a CUDA graph
#   losses     the distillation losses against eager and compiled torch, and their share of the memory's bandwidth
#   energy     joules of inference: windows of 5 s, interleaved, idle measured
#   cifar      CIFAR-100, full protocol, in calls of 8 minutes: name it until it says that it is done (not among "all");
#              SPARSEKD_DATA_CIFAR100 is the folder of the data, SPARSEKD_CIFAR more options (--recipe paper --seeds 3)
#   table      the short table of everything in DIR
#
# --rehearse runs every stage on tiny shapes, interpreted on the CPU. Without stages, all of them.
set -euo pipefail
cd "$(dirname "$0")/../.."

repo=$PWD
python=${PYTHON:-python3}
out=benchmarks/results/gpu
linked=build/gpu-source # the sources as an importable tree, for a machine without the build tools
rehearse=()
stages=()
while (($#)); do
  case $1 in
    --rehearse) rehearse=(--rehearse); out=${TMPDIR:-/tmp}/sparsekd-gpu-rehearsal; shift ;;
    --out) out=$2; shift 2 ;;
    --links) use_links=1; shift ;;
    -h | --help) sed -n '2,18p' "$0"; exit ;;
    -*) echo "acceptance.sh: unknown option $1; see --help" >&2; exit 2 ;;
    *) stages+=("$1"); shift ;;
  esac
done
((${#stages[@]})) || stages=(build tests layers layers256 layers1 network training losses energy table)
mkdir -p "$out"
out=$(cd "$out" && pwd)
export SPARSEKD_PLAN=${SPARSEKD_PLAN:-$out/plan.json}
[[ -d $linked ]] && cd "$linked"
run() { timeout 540 "$python" "$@" ${rehearse[@]+"${rehearse[@]}"}; }

stage_build() {
  cd "$repo"
  rm -rf "$linked"
  if ((${#rehearse[@]})) && [[ -z ${use_links:-} ]]; then
    "$python" -c 'import sparsekd.kernels'
    return
  fi
  if [[ -z ${use_links:-} ]] && "$python" -m pip install -q --no-build-isolation --no-deps -e . 2>"$out/build.log"; then
    "$python" -c 'import sparsekd.kernels; from sparsekd.backends import describe; print(describe())'
    return
  fi
  echo "build: not installed (see $out/build.log): the sources are used as they are, without the CPU kernels"
  mkdir -p "$linked/sparsekd"
  for entry in sparsekd/*; do ln -sfn "$repo/$entry" "$linked/$entry"; done
  ln -sfn "$repo/kernels" "$linked/sparsekd/kernels"
  for entry in benchmarks tests pyproject.toml; do ln -sfn "$repo/$entry" "$linked/$entry"; done
  cd "$linked"
  "$python" -c 'import sparsekd.kernels; from sparsekd.backends import cuda; print(cuda.describe("conv2d"))'
}

stage_tests() {
  local some=()
  ((${#rehearse[@]})) && some=(-k "table or mask or every_path or frozen or captured or steady or Linear")
  timeout 540 "$python" -m pytest -q -p no:cacheprovider tests/cuda tests/freeze/test_cuda.py ${some[@]+"${some[@]}"}
}

stage_layers() { run -m benchmarks.gpu.layers --batch 32 --out "$out"; }
stage_layers256() { run -m benchmarks.gpu.layers --batch 256 --mask wide square --out "$out"; }
stage_layers1() { run -m benchmarks.gpu.layers --batch 1 --direction forward --out "$out"; }

stage_network() {
  run -m benchmarks.gpu.network infer --network resnet50 --batch 256 --out "$out"
  ((${#rehearse[@]})) && return
  run -m benchmarks.gpu.network infer --network resnet50 --batch 1 --out "$out"
  run -m benchmarks.gpu.network infer --network vgg16 --batch 64 --out "$out"
}

stage_training() {
  run -m benchmarks.gpu.network train --network wrn-28-10 --batch 128 --out "$out"
  ((${#rehearse[@]})) && return
  run -m benchmarks.gpu.network train --network resnet50 --batch 128 --density 0.3 --out "$out"
}

stage_losses() {
  local pair where=(--device cuda)
  ((${#rehearse[@]})) && where=(--quick)
  for pair in wrn resnet; do
    timeout 540 "$python" -m benchmarks.attention "${where[@]}" --pair "$pair" --json "$out/losses_$pair.json"
  done
}

stage_energy() { run -m benchmarks.gpu.network energy --network resnet50 --batch 256 --density 0.3 --out "$out"; }

# Weights and where to go on stay under runs/, which git ignores; what is kept is the JSON.
stage_cifar() {
  local where=$repo/runs/cifar100-gpu some=(--device cuda) status=0
  ((${#rehearse[@]})) && where=$out/cifar100 some=(--device cpu --quick)
  # shellcheck disable=SC2086
  "$python" -m sparsekd run cifar100 "${some[@]}" --stop-after 8 --no-measure --out "$where" ${SPARSEKD_CIFAR:-} || status=$?
  if [[ -f $where/results.json ]]; then cp "$where/results.json" "$out/cifar100.json"; fi
  case $status in
    0) echo "cifar: done" ;;
    75) echo "cifar: call this stage again" ;;
    *) return "$status" ;;
  esac
}

stage_table() { "$python" -m benchmarks.gpu.table "$out"; }

for stage in "${stages[@]}"; do
  declare -F "stage_$stage" >/dev/null || { echo "acceptance.sh: no stage $stage; see --help" >&2; exit 2; }
  printf '\n== %s\n' "$stage"
  SECONDS=0
  "stage_$stage"
  printf '== %s took %d s\n' "$stage" "$SECONDS"
done
