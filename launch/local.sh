#!/usr/bin/env bash
# Train on this machine: launch/local.sh [-n PROCESSES] OVERRIDES...
# One process a GPU unless -n says otherwise, one process where there is none. Leaves with the run's exit code, which
# torchrun itself would turn into 1.
set -uo pipefail
here="$(cd "$(dirname "$0")/.." && pwd)"
source "$here/launch/env.sh"
processes=""
if [ "${1:-}" = "-n" ]; then
    processes="${2:?-n needs a number of processes}"
    shift 2
fi
if [ -z "$processes" ]; then
    processes="$(python3 -c 'import torch; print(max(1, torch.cuda.device_count()))')" || exit 70
fi
cores="$(nproc)"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > processes ? cores / processes : 1))}"
train="${SPARSETRON_TRAIN:-$here/train.py}"
if [ "$processes" = 1 ]; then
    exec python3 "$train" "$@" # nobody to join: signals and exit code are its own
fi
SPARSETRON_EXIT_FILE="$(mktemp)"
export SPARSETRON_EXIT_FILE
trap 'rm -f "$SPARSETRON_EXIT_FILE"' EXIT
for argument in "$@"; do
    if [ "$argument" = -m ] || [ "$argument" = --multirun ]; then
        SPARSETRON_EXIT_FILE="" SPARSETRON_PROCESSES="$processes" exec python3 "$train" "$@" # starts this script for each run
    fi
done
torchrun --standalone --nproc-per-node "$processes" "${TORCHRUN_FLAGS[@]}" "$train" "$@" &
torchrun=$!
for name in TERM USR1 INT; do
    trap 'kill -'"$name"' "$torchrun" 2>/dev/null' "$name"
done
wait "$torchrun"
code=$?
while kill -0 "$torchrun" 2>/dev/null; do # a trap ended the wait before torchrun
    wait "$torchrun"
    code=$?
done
said="$(cat "$SPARSETRON_EXIT_FILE")"
exit "${said:-$code}"
