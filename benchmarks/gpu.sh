#!/usr/bin/env bash
# What needs a GPU, in one call: the kernels' tests on it, the tests marked `gpu`, and the benchmarks, whose figures go to
# benchmarks/results/. Runs with PYTHON, else with the checkout's .venv. All steps run; the status tells of any failure.
set -euo pipefail

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
cd -- "$root"
python=${PYTHON:-$root/.venv/bin/python}
unset TRITON_INTERPRET

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "benchmarks/gpu.sh needs a GPU that torch can use: there is none here" >&2
    exit 2
fi

failed=()
step() {
    printf '\n== %s\n' "$*"
    "$@" || failed+=("$*")
}

step "$python" -m pytest tests/kernels -m 'not slow'
step "$python" -m pytest tests -m gpu --ignore=tests/kernels
step "$python" -m pytest tests/dispatch/test_symmetric.py -m 'not gpu'
step "$python" -m benchmarks.moe_layer --dtypes bfloat16 --write
step "$python" -m benchmarks.activation --write
step "$python" -m benchmarks.activation --activation quick_geglu
step "$python" -m benchmarks.symmetric --write
step "$python" -m benchmarks.symmetric --processes 4

if ((${#failed[@]})); then
    printf '\n== FAILED:'
    printf ' [%s]' "${failed[@]}"
    printf '\n'
    exit 1
fi
