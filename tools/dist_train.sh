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
config=$1
gpus=$2
master=${MASTER_ADDR:-127.0.0.1}
port=${PORT:-29500}
if [ -n "${RDZV_ID:-}" ]; then
  meet=(--rdzv_backend=c10d --rdzv_endpoint="$master:$port" --rdzv_id="$RDZV_ID")
  # torchrun knows its own address by the name of the machine alone.
  case " $(hostname -I 2>/dev/null || true) " in
    *" $master "*) meet+=(--rdzv_conf=is_host=1) ;;
  esac
else
  meet=(--node_rank="${NODE_RANK:-0}" --master_addr="$master" --master_port="$port")
fi
# torchrun's own variable; it hands on no SIGUSR1 by itself.
export PET_SIGNALS_TO_HANDLE=${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1}
exec python -m torch.distributed.run --nnodes="${NNODES:-1}" "${meet[@]}" \
  --nproc_per_node="$gpus" \
  "$(dirname "$0")/train.py" "$config" --launcher pytorch "${@:3}"
