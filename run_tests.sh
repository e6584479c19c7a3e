#!/usr/bin/env bash
# All checks: ./run_tests.sh [--slow] [pytest arguments...]. Makes .venv first where there is none. pytest runs last, so
# that its closing line ends the output; the exit status tells of the other steps, too. Paths are relative to the
# checkout.
#
#   --slow    the tests marked `slow` as well
set -euo pipefail

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
"$root/scripts/setup.sh"
cd -- "$root"

pytest_args=()
for argument in "$@"; do
    case $argument in
    --slow) pytest_args=(-m '' ${pytest_args[@]+"${pytest_args[@]}"}) ;;
    *) pytest_args+=("$argument") ;;
    esac
done

failed=()
step() {
    local name=$1
    shift
    printf '\n== %s\n' "$name"
    "$@" || failed+=("$name")
}

bin=$root/.venv/bin
export PYRIGHT_PYTHON_IGNORE_WARNINGS=1 # else it asks the package index for a newer version at every start

step "ruff check" "$bin/ruff" check .
step "ruff format" "$bin/ruff" format --check .
step "pyright" "$bin/pyright"
step "import-linter" "$bin/lint-imports" --no-logo

if ((${#failed[@]})); then
    printf '\n== FAILED before pytest:'
    printf ' [%s]' "${failed[@]}"
    printf '\n'
fi
# Two files at a time (three take as long on two cores): most tests wait for processes that they have started.
step "pytest" "$bin/python" -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder \
    ${pytest_args[@]+"${pytest_args[@]}"}

((${#failed[@]} == 0))
