#!/usr/bin/env bash
# The Keras layer's tests on both backends: TensorFlow wants other versions of some packages than constraints.txt has, so
# they run in an environment of their own, .cache/tensorflow, which the first run makes. Arguments go to pytest.
#
#   PYTHON                the interpreter to build with (python3)
#   CROSSDOCK_PIP_ARGS    more arguments for pip, as in scripts/setup.sh
set -euo pipefail

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$root/.cache/tensorflow
cd -- "$root"

if [[ ! -f $venv/whole ]]; then
    read -r -a pip_args <<<"${CROSSDOCK_PIP_ARGS:-}" || true
    rm -rf -- "$venv"
    "${PYTHON:-python3}" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --no-input --disable-pip-version-check \
        ${pip_args[@]+"${pip_args[@]}"} -e . torch==2.13.0 keras==3.15.1 tensorflow-cpu==2.21.0 pytest==9.2.0
    touch "$venv/whole"
fi
exec "$venv/bin/python" -m pytest tests/integrations/test_keras.py "$@"
