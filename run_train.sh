#!/usr/bin/env bash
# Trains: ./run_train.sh [overrides...]. Makes .venv first where there is none. Paths, the run folder's included, are
# relative to where it is called from.
#
#   CONFIG_FILE                                    the configuration (default: the checkout's configs/debug.toml)
#   NGPU                                           processes on this machine
#   NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT    for several machines; start it on each
set -euo pipefail

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
"$root/scripts/setup.sh"

launch=()
if [[ -n ${NGPU:-} ]]; then launch+=(--nproc "$NGPU"); fi
if [[ -n ${NNODES:-} ]]; then launch+=(--nnodes "$NNODES"); fi
if [[ -n ${NODE_RANK:-} ]]; then launch+=(--node-rank "$NODE_RANK"); fi
if [[ -n ${MASTER_ADDR:-} ]]; then launch+=(--master-addr "$MASTER_ADDR"); fi
if [[ -n ${MASTER_PORT:-} ]]; then launch+=(--master-port "$MASTER_PORT"); fi

# The number of tokens that reach a rank differs from step to step, which fragments the caching allocator's memory.
if [[ -z ${PYTORCH_ALLOC_CONF+set} && -z ${PYTORCH_CUDA_ALLOC_CONF+set} ]] &&
    { [[ -e /dev/nvidia0 ]] || command -v nvidia-smi >/dev/null; }; then
    export PYTORCH_ALLOC_CONF=expandable_segments:True,max_split_size_mb:128,garbage_collection_threshold:0.8
fi

config=("${CONFIG_FILE:-$root/configs/debug.toml}")
previous=''
for argument in "$@"; do
    case $previous$argument in
    --job.dump[-_]folder=* | --job.dump[-_]folder\ *)
        # A run is resumed with its own settings.
        if [[ -z ${CONFIG_FILE:-} && -f ${argument#--job.dump?folder=}/config.toml ]]; then config=(); fi
        ;;
    esac
    previous="$argument "
done

exec "$root/.venv/bin/crossdock" train ${config[@]+"${config[@]}"} ${launch[@]+"${launch[@]}"} "$@"
