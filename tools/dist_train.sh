#!/usr/bin/env bash
# Train on several GPUs (or processes): tools/dist_train.sh CONFIG GPUS [arguments of train.py]
# Several nodes: set NNODES, NODE_RANK, MASTER_ADDR and PORT on each. With RDZV_ID (any name of the
# job) they meet by torchrun's rendezvous instead, and need no NODE_RANK.
# SIGTERM and SIGUSR1 reach every process: the training saves after its step, and ends.
set -euo pipefail
if [ $# -lt 2 ]; then
  echo "usage: $0 CONFIG GPUS [arguments of train.py]" >&2
  exit 2
fi
exec bash "$(dirname "$0")/dist.sh" train.py "$2" "$1" "${@:3}"
