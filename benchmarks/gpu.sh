#!/usr/bin/env bash
# What has to run on a GPU, in one command of at most 8 minutes: writes JSON under $OUT (default: benchmarks/results/gpu).
# Every part is a process of its own with its own limit, so that one that hangs or fails takes no other along, and writes
# its file after every case. Without a GPU, `benchmarks/gpu.sh --interpret` runs the same checks interpreted, untimed.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-benchmarks/results/gpu}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export GRAPHOPT_CACHE=${GRAPHOPT_CACHE:-$(mktemp -d)}
failed=()
for part in pointwise:150 products:120 packed:90 attention:120; do
  timeout --kill-after=10 "${part#*:}" "${PYTHON:-python}" benchmarks/gpu_kernels.py "$out" --part "${part%:*}" "$@" ||
    failed+=("${part%:*}")
done
if ((${#failed[@]})); then
  echo "failed or out of time: ${failed[*]}" >&2
  exit 1
fi
