#!/usr/bin/env bash
# What has to run on a GPU, in one command of at most 9 minutes: writes JSON under $OUT (default: benchmarks/results/gpu).
# Every part is a process of its own with its own limit, so that one that hangs or fails takes no other along, and writes
# its file after every case. The kernels' parts check, mostly compile, and run beside each other, so that their times only
# show what is far off; then whole models are timed, one part after another. Without a GPU, `benchmarks/gpu.sh --interpret` runs the same interpreted, at tiny sizes.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-benchmarks/results/gpu}
# A machine without a network is given what it lacks beside this checkout (`make gpu-packages`); its own packages go first.
packages=${GPU_PACKAGES:-$PWD/.gpu_packages}
PYTHON=${PYTHON:-$(command -v python || command -v python3)}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
if [[ -d $packages ]] && ! "$PYTHON" -c 'import pydantic' 2>/dev/null; then
  export PYTHONPATH="$PYTHONPATH:$packages"
fi
if ! "$PYTHON" -c 'import torch, triton, transformers, graphopt, graphopt.compiler.compile'; then
  echo "install graphopt with its dependencies, or run 'make gpu-packages' where there is a network and take .gpu_packages along" >&2
  exit 2
fi
export GRAPHOPT_CACHE=${GRAPHOPT_CACHE:-$(mktemp -d)}
failed=()
kernels=(pointwise products packed attention bounded experts)
kernels_limit=125
models=(decode_8b:115 steps:75 transformed:95 decode_1b:70 prefill:50)

pids=()
for part in "${kernels[@]}"; do
  timeout --kill-after=5 "$kernels_limit" "$PYTHON" benchmarks/gpu_kernels.py "$out" --part "$part" "$@" &
  pids+=($!)
done
# Choosing block sizes and replay: the tests that need a device run when there is one.
timeout --kill-after=5 "$kernels_limit" "$PYTHON" -m pytest -q tests/backends/test_autotune.py tests/backends/test_replay.py &
pids+=($!)
kernels+=(runtime)
for i in "${!kernels[@]}"; do
  wait "${pids[$i]}" || failed+=("${kernels[$i]}")
done
for part in "${models[@]}"; do
  name=${part%:*} limit=${part#*:}
  command=(benchmarks/gpu_models.py "$out" --part "$name")
  # Attention and experts alone, beside FlexAttention and torch's grouped GEMM.
  [ "$name" = steps ] && command=(benchmarks/gpu_steps.py "$out")
  # A part stops by itself before its limit, between two cases.
  timeout --kill-after=5 "$limit" "$PYTHON" "${command[@]}" --limit $((limit - 15)) "$@" ||
    failed+=("$name")
done
if ((${#failed[@]})); then
  echo "failed or out of time: ${failed[*]}" >&2
  exit 1
fi
