#!/usr/bin/env bash
# Train on GPUS processes of this machine, or of NNODES machines (run it once on each):
#   [NNODES=2 NODE_RANK=0 MASTER_ADDR=host PORT=29500] tools/dist_train.sh CONFIG GPUS [train.py flags]
set -euo pipefail
if [ $# -lt 2 ]; then
    echo "usage: $0 CONFIG GPUS [train.py flags]" >&2
    exit 2
fi

exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes="${NNODES:-1}" \
    --node_rank="${NODE_RANK:-0}" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" \
    --master_port="${PORT:-29500}" \
    --nproc_per_node="$2" \
    "$(dirname "$0")/train.py" "$1" --launcher pytorch "${@:3}"
