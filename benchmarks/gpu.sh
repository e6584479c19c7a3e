#!/usr/bin/env bash
# What needs a GPU, in one call of less than 9 minutes on one H200: kernels' tests on it, the tests marked `gpu`, and the
# benchmarks, whose figures go to benchmarks/results/; then one table. With --tune instead: `crossdock tune` for the
# presets, which leaves what it found in benchmarks/results/tuned.json.
#
# Runs with PYTHON, else with the checkout's .venv. Where WHEELS names a folder of wheels (benchmarks/wheels.sh fetches
# them), what is missing is installed from there to a folder of its own. All steps run, each with a limit of its own; the
# status tells of any failure.
set -euo pipefail

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
cd -- "$root"
python=${PYTHON:-$root/.venv/bin/python}
unset TRITON_INTERPRET
export PYTHONUNBUFFERED=1

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "benchmarks/gpu.sh needs a GPU that torch can use: there is none here" >&2
    exit 2
fi

if [[ -n ${WHEELS:-} ]]; then
    site=$(mktemp -d)
    trap 'rm -rf -- "$site"' EXIT
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$WHEELS"/*.whl
    export PYTHONPATH=$root:$site${PYTHONPATH:+:$PYTHONPATH}
fi

failed=()
step() { # limit in seconds, command
    local limit=$1
    shift
    printf '\n== %s\n' "$*"
    local status=0
    timeout --kill-after=5 "$limit" "$@" || status=$?
    if ((status)); then
        ((status == 124)) && printf 'cut off after %s seconds\n' "$limit"
        failed+=("$*")
    fi
}

if [[ ${1:-} == --tune ]]; then
    for preset in qwen3_30b_a3b qwen3_10b_a1b; do
        step 280 "$python" -m crossdock tune "configs/$preset.toml" --nproc 1 --parallelism.expert-parallel-degree 1 \
            --seconds 240 --output benchmarks/results/tuned.json
    done
else
    workers=()
    # Compiling is most of what these tests do.
    "$python" -c 'import xdist' 2>/dev/null && workers=(-n 8)
    step 130 "$python" -m pytest "${workers[@]}" tests/kernels -m 'not slow'
    step 110 "$python" -m pytest "${workers[@]}" tests/gpu tests/dispatch/test_symmetric.py -m 'gpu or not slow'
    step 110 "$python" -m benchmarks.expert_kernels --profile --write
    step 50 "$python" -m benchmarks.activation --write
    step 30 "$python" -m benchmarks.symmetric --write
    step 15 "$python" -m benchmarks.symmetric --processes 4
    step 90 "$python" -m benchmarks.train_step_gpu --write
    printf '\n'
    for benchmark in expert_kernels activation symmetric train_step_gpu; do
        file=benchmarks/results/${benchmark}_$(date +%F).json
        [[ -f $file ]] && "$python" -m benchmarks.table "$file"
    done
fi

if ((${#failed[@]})); then
    printf '\n== FAILED:'
    printf ' [%s]' "${failed[@]}"
    printf '\n'
    exit 1
fi
