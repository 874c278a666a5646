#!/usr/bin/env bash
# What has to run on a GPU, in one command: writes JSON under $OUT (default: benchmarks/results/gpu).
# Without a GPU, `benchmarks/gpu.sh --interpret` runs the correctness part under Triton's interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-benchmarks/results/gpu}
export GRAPHOPT_CACHE=${GRAPHOPT_CACHE:-$(mktemp -d)}
timeout 500 "${PYTHON:-python}" benchmarks/gpu_kernels.py "$out" "$@"
