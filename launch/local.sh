#!/usr/bin/env bash
# Train on this machine: launch/local.sh [-n PROCESSES] OVERRIDES...
# Under a supervisor, which starts the run again after a failure: see launch/supervise.py.
here="$(cd "$(dirname "$0")/.." && pwd)"
source "$here/launch/env.sh"
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
exec python3 -m launch.supervise "$@"
