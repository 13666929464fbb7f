#!/usr/bin/env bash
# A small NSA model, its full-attention twin on the same batches, and the comparison. Usage: launch/demo.sh [DATA]
set -euo pipefail
cd "$(dirname "$0")/.."
data=${1:-corpus/stdlib}
for attention in nsa full; do
    echo "== $attention attention"
    launch/local.sh -n 1 experiment=demo attention=$attention data.path="$data" run.dir=runs/demo-$attention
done
python3 -m launch.compare runs/demo-nsa runs/demo-full --output runs/demo.html
