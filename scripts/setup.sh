#!/usr/bin/env bash
# Makes the checkout's .venv: the package (editable) and all that training and the tests need, as pinned in
# constraints.txt. Run by ./run_train.sh and ./run_tests.sh at every start. Where .venv is whole and current it starts
# neither Python nor pip.
#
#   PYTHON                the interpreter to build with; else the first of python3, python3.14 ... python3.11 that will do
#   CROSSDOCK_PIP_ARGS    more arguments for pip, split at blanks. PyPI's torch for Linux brings several GB of CUDA
#                         packages; on a machine without a GPU, "--extra-index-url URL" with the URL of an index of CPU
#                         builds gives the small build: its version sorts higher, so pip prefers it.
#
# Needs a package index and nothing else: the checks need no Node.js and no npm, as pyright's wheel holds pyright and the
# extra pyright[nodejs] holds node. (pyright asks npm only where PYRIGHT_PYTHON_FORCE_VERSION names another version.)
set -euo pipefail

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$root/.venv
stamp=$venv/setup.stamp # written last, by rename: a .venv without it is taken for half made
log=$venv/setup.log

say() { printf 'crossdock set-up: %s\n' "$*" >&2; }
fail() {
    say "$*"
    exit 1
}

digest() {
    if command -v sha256sum >/dev/null; then sha256sum; else shasum -a 256; fi
}

# What the environment itself hangs on: a checkout that was moved or copied, or another interpreter, needs a new one.
venv_key() {
    {
        printf '%s\n' "$root"
        readlink -f -- "$venv/bin/python"
        cat -- "$venv/pyvenv.cfg" "$root/scripts/setup.sh"
    } | digest
}

packages_key() { cat -- "$root/pyproject.toml" "$root/constraints.txt" | digest; }

# Prints the real path of the interpreter that $1 stands for, seen through virtual environments (the one to be replaced
# may be active) and launcher scripts. 3: too old. 4: cannot make environments; prints its version.
probe() {
    "$1" -c '
import os, sys
if sys.version_info < (3, 11):
    sys.exit(3)
try:
    import ensurepip, venv
except ImportError:
    print("%d.%d" % sys.version_info[:2])
    sys.exit(4)
print(os.path.realpath(sys._base_executable))
' 2>/dev/null </dev/null
}

find_python() {
    local names=(python3 python3.14 python3.13 python3.12 python3.11) name candidate found status without_venv=''
    if [[ -n ${PYTHON:-} ]]; then names=("$PYTHON"); fi
    for name in "${names[@]}"; do
        while IFS= read -r candidate; do
            status=0
            found=$(probe "$candidate") || status=$?
            if ((status == 0)); then
                printf '%s\n' "$found"
                return
            elif ((status == 4)) && [[ -z $without_venv ]]; then
                without_venv="$candidate (Python $found) lacks venv or ensurepip; Debian and Ubuntu: apt-get install python$found-venv"
            fi
        done < <(type -aP -- "$name")
    done
    if [[ -n $without_venv ]]; then fail "$without_venv"; fi
    if [[ -n ${PYTHON:-} ]]; then fail "PYTHON=$PYTHON is no Python of version 3.11 or newer"; fi
    fail "no Python of version 3.11 or newer on PATH (looked for ${names[*]}); install one, or name it: PYTHON=/path/to/python3"
}

# Prints `whole`, `outdated` (other packages are wanted) or `unusable` (absent, half made, moved, another interpreter).
state() {
    local made_for='' holds=''
    if [[ -f $stamp && -x $venv/bin/python && -f $venv/pyvenv.cfg ]]; then
        { read -r made_for && read -r holds; } <"$stamp" || true
    fi
    if [[ -z $made_for || $made_for != "$(venv_key)" ]]; then
        echo unusable
    elif [[ -n $wanted && $(readlink -f -- "$venv/bin/python") != "$wanted" ]]; then
        echo unusable
    elif [[ $holds != "$(packages_key)" ]]; then
        echo outdated
    else
        echo whole
    fi
}

# Runs the command after $1 with its output in the log; $1 says what has failed where it fails.
logged() {
    local failure=$1
    shift
    if ! "$@" >>"$log" 2>&1; then
        tail -n 20 -- "$log" >&2
        fail "$failure; the whole log: $log"
    fi
}

wanted=''
if [[ -n ${PYTHON:-} ]]; then wanted=$(find_python); fi
if [[ $(state) == whole ]]; then exit 0; fi

# One set-up at a time. pip inherits the lock, so that one that outlives a killed set-up is waited for, too.
exec 9>>"$root/.venv.lock"
if command -v flock >/dev/null && ! flock -n 9; then
    say "waiting for another set-up of this checkout"
    flock 9 || say "the file system has no locks; going on without one"
fi

case $(state) in
whole) exit 0 ;;
outdated)
    say "the wanted packages have changed; updating .venv (log: $log)"
    rm -f -- "$stamp"
    : >"$log"
    ;;
*)
    python=$wanted
    if [[ -z $python ]]; then python=$(find_python); fi
    say "making .venv with $python; the first time takes a minute or more (log: $log)"
    rm -rf -- "$venv"
    mkdir -- "$venv"
    logged "no virtual environment could be made with $python" "$python" -m venv "$venv"
    ;;
esac

read -r -a pip_args <<<"${CROSSDOCK_PIP_ARGS:-}" || true
cd -- "$root"
logged "pip could not install the packages" \
    "$venv/bin/python" -m pip install --no-input --disable-pip-version-check --progress-bar off \
    ${pip_args[@]+"${pip_args[@]}"} -c constraints.txt -e '.[dev]'

printf '%s\n' "$(venv_key)" "$(packages_key)" >"$stamp.new"
mv -f -- "$stamp.new" "$stamp"
say "done"
