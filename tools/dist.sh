#!/usr/bin/env bash
# What dist_train.sh and dist_test.sh share: tools/dist.sh SCRIPT PROCESSES [arguments of SCRIPT]
set -euo pipefail
script=$1
processes=$2
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
  --nproc_per_node="$processes" "$(dirname "$0")/$script" "${@:3}" --launcher pytorch
