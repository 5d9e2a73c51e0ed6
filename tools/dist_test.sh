#!/usr/bin/env bash
# Test on GPUS processes of this machine, or of NNODES machines (run it once on each):
#   [NNODES=2 NODE_RANK=0 MASTER_ADDR=host PORT=29500] \
#       tools/dist_test.sh CONFIG CHECKPOINT GPUS [test.py flags]
set -euo pipefail
if [ $# -lt 3 ]; then
    echo "usage: $0 CONFIG CHECKPOINT GPUS [test.py flags]" >&2
    exit 2
fi

exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes="${NNODES:-1}" \
    --node_rank="${NODE_RANK:-0}" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" \
    --master_port="${PORT:-29500}" \
    --nproc_per_node="$3" \
    "$(dirname "$0")/test.py" "$1" "$2" --launcher pytorch "${@:4}"
